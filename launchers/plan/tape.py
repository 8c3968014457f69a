"""A forward pass on paper: its parameters, its FLOPs, and the bytes that autograd keeps of it for the backward.

`models.py` calls a Tape as the real modules call torch. Every call returns the tensor that torch would, as a size, and
notes which tensors its backward needs; one that several calls need is kept once, as torch keeps one storage.
Letters: B batch, S sequence, D width, H heads, C channels.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator

FP32 = 4
NOISE_BYTES = 135
"""What pretrain.models.noise reads and writes for an element: the operations of its hash, one after the other."""
BATCH = "batch"
"""The part that is no activation: the micro-batch itself."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor: how many elements, of how many bytes each; `of`: the tensor that it is a slice of, in its memory."""

    numel: int
    width: int = FP32
    of: "Value | None" = None

    @property
    def bytes(self) -> int:
        return self.numel * self.width


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """One parameter. low: of a plain linear or convolution, which DeepSpeed sends in the precision of the autocast."""

    numel: int
    low: bool = False


@dataclasses.dataclass
class Block:
    """A part that may be computed again in the backward: what is kept of it, what would be, and the work.

    copies: its weights that autocast makes copies of, which are not kept either.
    """

    saved: int
    input: int
    flops: int
    transient: int
    copies: frozenset[Weight]


class Tape:
    """Calls in the order of a forward. low: bytes of an element under autocast, 4 where there is none."""

    def __init__(self, low: int, on_gpu: bool) -> None:
        self.low, self.on_gpu = low, on_gpu
        self.weights: list[Weight] = []
        self.saved: dict[Value, str] = {}
        self.copies: dict[Weight, int] = {}
        self.part = "layers"
        self.matmul_flops: dict[str, int] = {}
        self.attention_flops = 0
        self.repeated_flops = 0
        self.without_gradient_flops = 0
        self.transient = 0
        self.moved = 0
        self.blocks: list[Block] = []

    # ------------------------------------------------------------------------------------------- sums

    @property
    def forward_flops(self) -> int:
        """Of matrix products, attention and convolutions: a multiply-add is two."""
        return sum(self.matmul_flops.values()) + self.attention_flops

    @property
    def backward_flops(self) -> int:
        """A gradient for both factors of every product, save where one needs none, such as pixels."""
        return 2 * self.forward_flops - self.without_gradient_flops

    def saved_bytes(self, part: str | None = None) -> int:
        """Kept for the backward, of one part or of all."""
        return sum(value.bytes for value, of in self.saved.items() if part in (None, of))

    def copied_bytes(self, low: bool | None = None, besides: Collection[Weight] = ()) -> int:
        """Weights in the autocast's precision, kept beside the weights; of those that are low, or not, or of all."""
        return sum(size for weight, size in self.copies.items() if low in (None, weight.low) and weight not in besides)

    # --------------------------------------------------------------------------------------- notes

    def keep(self, *values: Value) -> None:
        """Its backward needs these."""
        for value in values:
            self.saved.setdefault(value.of or value, self.part)

    def hold(self, *values: int) -> None:
        """Bytes that live at the same time beside what is kept."""
        self.transient = max(self.transient, sum(values))

    @contextlib.contextmanager
    def named(self, part: str) -> Iterator[None]:
        """Within, what is kept and computed counts as `part`."""
        before, self.part = self.part, part
        yield
        self.part = before

    @contextlib.contextmanager
    def block(self, x: Value) -> Iterator[None]:
        """A block of the model, whose input is x."""
        saved, flops, copies = self.saved_bytes(), self.forward_flops, set(self.copies)
        peak, self.transient = self.transient, 0
        yield
        inside = self.saved_bytes() - saved
        made = frozenset(self.copies.keys() - copies)
        self.blocks.append(Block(inside, x.bytes, self.forward_flops - flops, self.transient, made))
        self.transient = max(peak, self.transient)

    # ------------------------------------------------------------------------------------- weights

    def weight(self, numel: int, low: bool = False) -> Weight:
        """A parameter of the module that is called now."""
        self.weights.append(Weight(numel, low))
        return self.weights[-1]

    def lowered(self, x: Value) -> Value:
        """x as a product takes it: under autocast a copy, one for each product that reads it."""
        return x if x.width == self.low else Value(x.numel, self.low)

    def _product(self, x: Value, flops: int, fed: bool) -> None:
        self.matmul_flops[self.part] = self.matmul_flops.get(self.part, 0) + flops
        self.without_gradient_flops += flops if fed else 0
        self.keep(x)

    def _result(self, x: Value, numel: int, width: int | None = None) -> Value:
        out = Value(numel, width or self.low)
        self.moved += x.bytes + out.bytes
        self.hold(x.bytes, out.bytes)
        return out

    # ------------------------------------------------------------------------------------ products

    def linear(self, x: Value, fan_in: int, fan_out: int, bias: bool = True) -> Value:
        """nn.Linear: [..., fan_in] -> [..., fan_out]."""
        matrix = self.weight(fan_in * fan_out, low=True)
        if bias:
            self.weight(fan_out, low=True)
        return self.times(x, matrix, fan_in, fan_out)

    def times(self, x: Value, matrix: Weight, fan_in: int, fan_out: int) -> Value:
        """x by a matrix that is there already."""
        read = self.lowered(x)
        self._product(read, 2 * x.numel * fan_out, fed=False)
        self._copy(matrix)
        return self._result(read, x.numel // fan_in * fan_out)

    def convolution(
        self, x: Value, side: int, channels: int, out: int, kernel: int, stride: int = 1, bias: bool = True,
        fed: bool = False, side_out: int | None = None,
    ) -> Value:  # fmt: skip
        """nn.Conv2d: [B, channels, side, side] -> [B, out, s, s], s = side / stride or told. fed: x is the batch."""
        matrix = self.weight(channels * out * kernel**2, low=True)
        if bias:
            self.weight(out, low=True)
        if fed:
            self.saved[x] = BATCH
        read = self.lowered(x)
        images = x.numel // (channels * side**2)
        places = images * (side_out or side // stride) ** 2
        self._product(read, 2 * places * matrix.numel, fed)
        self._copy(matrix)
        return self._result(read, places * out)

    def _copy(self, matrix: Weight) -> None:
        if self.low != FP32:
            self.copies[matrix] = matrix.numel * self.low

    def attention(self, inputs: list[Value], batch: int, heads: int, length: int, mask: int, dropped: bool) -> Value:
        """SDPA over [B, H, S, D/H]; inputs: the tensors that hold queries, keys and values; mask: its elements.

        dropped: weights are made explicit, and again in the backward. On a CPU all of it is in float32.
        """
        numel = sum(value.numel for value in inputs) // 3
        read = inputs
        if not self.on_gpu and self.low != FP32:
            read = [Value(numel) for _ in range(3)]
        self.attention_flops += 4 * numel * length
        self.keep(*read)
        out = Value(numel, read[0].width)
        scores = batch * heads * length * length
        if dropped:
            self.keep(Value(mask, 1))
            self.repeated_flops += 2 * numel * length  # the scores; the product with the values is not made again
            self.hold(3 * scores * FP32, scores)
            self.moved += 2 * (NOISE_BYTES + 10 * FP32) * scores
        else:
            self.keep(out, Value(mask, out.width), Value(batch * heads * length))
        self.moved += 4 * out.bytes
        if not dropped and out.width == self.low:
            return out
        return Value(numel, self.low)

    # --------------------------------------------------------------------------------- element by element

    def norm(self, x: Value, width: int, affine: int | None = None, groups: int | None = None) -> Value:
        """LayerNorm over `width` elements, or GroupNorm: `groups` statistics an image of `width` elements.

        A GPU normalises in float32 under autocast; a CPU in the precision of its input.
        """
        self.weight(affine or width)
        self.weight(affine or width)
        read = x if x.width == FP32 or not self.on_gpu else Value(x.numel)
        rows = x.numel // width * (groups or 1)
        self.keep(read, Value(rows), Value(rows))
        return self._result(read, x.numel, read.width)

    def activation(self, x: Value) -> Value:
        """GELU, SiLU, ReLU: keeps its input."""
        self.keep(x)
        return self._result(x, x.numel, x.width)

    def quick_gelu(self, x: Value) -> Value:
        """x * sigmoid(1.702 x): keeps the sigmoid too."""
        self.keep(x, self._result(x, x.numel, x.width))
        return self._result(x, x.numel, x.width)

    def dropout(self, x: Value, rate: float) -> Value:
        """Keeps which elements stay, a byte each; where nothing is dropped, nothing."""
        if not rate:
            return x
        self.keep(Value(x.numel, 1))
        self.hold(12 * x.numel)
        self.moved += NOISE_BYTES * x.numel
        return Value(x.numel, x.width)

    def add(self, x: Value, y: Value) -> Value:
        """Keeps nothing; the wider precision wins."""
        return self._result(x, x.numel, max(x.width, y.width))

    def same(self, x: Value, numel: int | None = None) -> Value:
        """Other memory of x's precision: a copy, a slice that is copied, a padded or scaled picture."""
        return self._result(x, numel or x.numel, x.width)

    def embedding(self, tokens: int, entries: int, width: int, weight: Weight | None = None) -> tuple[Value, Weight]:
        """Rows of a table, float32 -> the rows and the table; keeps the ids, int64."""
        table = weight or self.weight(entries * width)
        self.saved[Value(tokens, 8)] = BATCH
        return Value(tokens * width), table

    def cross_entropy(self, logits: Value) -> None:
        """Keeps the log-probabilities in float32; their gradient is as large."""
        self.keep(Value(logits.numel))
        self.hold(logits.bytes, logits.numel * FP32, logits.numel * FP32)
        self.moved += 4 * logits.numel * FP32

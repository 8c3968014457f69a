"""A simulated device: tensors without memory that modules see as on a GPU or a CPU, and that device's autocast rules.

Tensors are on torch's "meta" device, whose operations only compute shapes and dtypes. Within a PlannedDevice they
report the planned device, and calls of torch's functions are overridden to do what autocast and attention do there:
torch built without CUDA can neither enter CUDA's autocast nor run a backward of fake tensors on "cuda".
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import _default_meta_extractor

GPU, CPU = "xpu", "cpu"
"""Device types of a planned GPU and CPU; not "cuda", whose autocast torch refuses to enter without CUDA."""
META = torch.device("meta")
LOWER = frozenset((
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu",
    "matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addmv", "addr", "addbmm", "baddbmm", "einsum",
    "chain_matmul", "multi_dot", "vecdot", "scaled_dot_product_attention",
))  # fmt: skip
"""Functions that autocast runs in low precision, from torch's "CUDA Ops that can autocast to float16"; also on CPU."""
LOSSES = (
    "cross_entropy", "nll_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "prod", "cdist",
    "soft_margin_loss", "hinge_embedding_loss", "binary_cross_entropy_with_logits", "cosine_embedding_loss",
)  # fmt: skip
FULL = {
    CPU: frozenset(LOSSES),
    GPU: frozenset((
        *LOSSES, "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal",
        "rsqrt", "sinh", "tan", "pow", "__pow__", "square", "softplus", "layer_norm", "group_norm", "rms_norm", "norm",
        "normalize", "vector_norm", "matrix_norm", "cosine_similarity", "dist", "renorm", "logsumexp", "softmax",
        "log_softmax", "cumprod", "cumsum", "sum",
    )),
}  # fmt: skip
"""Functions that autocast runs in float32, by device, from the same lists."""


class PlannedDevice(TorchFunctionMode):
    """Mode in which tensors report being on a GPU or a CPU. low: autocast's dtype, or None without autocast."""

    def __init__(self, on_gpu: bool, low: torch.dtype | None) -> None:
        super().__init__()
        self.name, self.low = (GPU if on_gpu else CPU), low
        self.device = torch.device(self.name)
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function as the planned device would."""
        named, name = kwargs or {}, getattr(function, "__name__", "")
        if name == "__get__":
            return self._property(function, args)
        if torch.is_autocast_enabled(self.name) and (to := self._precision(name)) is not None:
            args, named = self._cast(args, to), self._cast(named, to)
        if name == "scaled_dot_product_attention":
            return self._attention(*args, **named)
        args = tuple(META if self._is_here(each) else each for each in args)
        return function(*args, **{key: META if self._is_here(each) else each for key, each in named.items()})

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Enter autocast as a training step does; within it, each weight is cast once."""
        with torch.autocast(self.name, self.low, enabled=self.low is not None):
            yield
        self.copies.clear()

    def stay_in(self, block: nn.Module) -> None:
        """Keep a block on this device when a backward recomputes it, at which time torch has left this mode."""
        entered: list[bool] = []

        def enter(*_: Any) -> None:
            entered.append(not torch._C._is_torch_function_mode_enabled())
            if entered[-1]:
                self.__enter__()

        def leave(*_: Any) -> None:
            if entered.pop():
                self.copies.clear()  # autocast was entered only for this block
                self.__exit__(None, None, None)

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave, always_call=True)

    def _property(self, getter: Any, args: Any) -> Any:
        said = getter(*args)
        if said == META and getter == _DEVICE:
            checks = sys._getframe(2).f_code is _CHECKS  # torch's checkpoint, which asks inside and outside this mode
            return said if checks else self.device
        return self.name == GPU if getter == _IS_CUDA and args[0].is_meta else said

    def _is_here(self, thing: Any) -> bool:
        return isinstance(thing, torch.device | str) and str(thing).partition(":")[0] == self.name

    def _precision(self, name: str) -> torch.dtype | None:
        if name in LOWER:
            return self.low
        return torch.float32 if name in FULL[self.name] else None

    def _cast(self, thing: Any, to: torch.dtype) -> Any:
        if isinstance(thing, dict):
            return {key: self._cast(each, to) for key, each in thing.items()}
        if isinstance(thing, list | tuple):
            return type(thing)(self._cast(each, to) for each in thing)
        if not isinstance(thing, Tensor) or not thing.is_floating_point() or thing.dtype in (to, torch.float64):
            return thing
        return self._copy(thing, to) if thing.is_leaf and thing.requires_grad and to == self.low else thing.to(to)

    def _copy(self, weight: Tensor, to: torch.dtype) -> Tensor:
        if id(weight) not in self.copies:
            self.copies[id(weight)] = weight, weight.to(to)
        return self.copies[id(weight)][1]

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Call the kernel that torch would: on a GPU flash in 16 bits without a mask, else the memory-efficient one."""
        kernels, bias = torch.ops.aten, attn_mask
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
        if self.name == CPU:
            on_cpu = kernels._scaled_dot_product_flash_attention_for_cpu
            return on_cpu(query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale)[0]
        if bias is None and query.dtype != torch.float32:
            flash = kernels._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        wide = None if bias is None else bias.expand(*query.shape[:-1], key.shape[-2])
        efficient = kernels._scaled_dot_product_efficient_attention
        return efficient(query, key, value, wide, True, dropout_p, is_causal, scale=scale)[0]


_CHECKS = _default_meta_extractor.__code__
_GETTERS: Any = torch.Tensor
_DEVICE, _IS_CUDA = _GETTERS.device.__get__, _GETTERS.is_cuda.__get__

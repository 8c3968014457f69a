"""The report of a dataset, as text and as a real browser shows it."""

import base64
import html
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.ingest.report import write_report
from data_pipeline.storage import open_storage
from tests.data_pipeline.web import Web


class Page(html.parser.HTMLParser):
    """Titles, visible text, addresses of everything that the page would load."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in ("src", "href") and value]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def mixed(folder, build_here, tmp_path):
    """Four samples; one row is no image, one has the bytes of another; a key that would be markup."""
    (folder / "b/0.png").write_bytes(b"<html>")
    shutil.copy(folder / "a/0.png", folder / "b/1.png")
    shutil.move(folder / "c.png", folder / "<script>alert(1)<.png")
    (folder / "<script>alert(1)<.txt").write_text("一只狗在海滩上奔跑<b>")
    build_here(
        source={"kind": "folder", "path": str(folder)}, output=f"{tmp_path}/out", shard_size=2, dedup={"exact": True}
    )
    return tmp_path / "out"


def test_a_report_shows_the_account_and_is_complete_in_itself(mixed):
    path = write_report(mixed)
    text = Path(path).read_text()
    page = Page(text)
    words = " ".join(page.words)
    assert path == f"{mixed}/report.html" and page.open == []
    assert "6 in = 4 out + 2 rejected, 1 of them duplicates" in words
    assert "not_an_image" in words and "duplicate_image" in words and "same bytes as row" in words
    assert len(page.loaded) == 4 + 1 and all(address.startswith("data:image/jpeg;base64,") for address in page.loaded)
    assert "<script>alert(1)<" in words and "<script>" not in text and "http" not in re.sub(r"base64,\S+", "", text)
    assert re.search(r"zh\s+2", words)
    assert text == Path(write_report(mixed)).read_text()


def pictures(text):
    """Every picture of the page with the text of its table row, or of its figure."""
    places = re.findall(r"<tr>(?:(?!</tr>).)*</tr>|<figure>(?:(?!</figure>).)*</figure>", text, re.S)
    found = {}
    for place in places:
        words = " ".join(re.sub(r"<[^>]+>", " ", place).split())
        coded = re.search(r'base64,([^"]+)', place)
        found[words] = None if coded is None else Image.open(io.BytesIO(base64.b64decode(coded[1]))).convert("RGB")
    return found


@pytest.mark.slow
def test_rejected_images_are_shown_from_the_source_where_they_can_be_read(folder, build_here, make_config, tmp_path):
    colours = {"a/0": "red", "b/1": "blue"}
    for name, colour in colours.items():
        Image.new("RGB", (48, 24), colour).save(folder / f"{name}.png")
    (folder / "a/1.png").write_bytes(b"<html>")
    (folder / "b/2.png").unlink()
    (folder / "b/2.txt").unlink(missing_ok=True)
    tree = {"source": {"kind": "folder", "path": str(folder)}, "output": f"{tmp_path}/out", "shard_size": 2}
    tree["filters"] = {"square": "aspect == 1"}
    build_here(**tree)
    (folder / "b/1.png").unlink()  # since then
    alone = pictures(Path(write_report(tmp_path / "out")).read_text())
    assert not [words for words, shown in alone.items() if words.startswith("square") and shown]
    shown = pictures(Path(write_report(tmp_path / "out", build=make_config(**tree))).read_text())
    [red] = [picture for words, picture in shown.items() if words.startswith("square a/0")]
    assert red.size == (48, 24) and np.abs(np.asarray(red, int) - [255, 0, 0]).max() < 8
    assert [picture for words, picture in shown.items() if words.startswith(("square b/1", "not_an_image a/1"))] == [
        None
    ] * 2


@pytest.mark.slow
def test_rejected_images_are_shown_from_the_cache_of_what_was_fetched(build_here, make_config, make_png, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    (files / "small.png").write_bytes(make_png(1, 12))
    (files / "large.png").write_bytes(make_png(2, 40))
    with Web(files) as web:
        rows = [{"image": f"{web.address}/file/{name}", "caption": "c"} for name in ("small.png", "large.png", "gone")]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        fetch = {"allow_networks": ["127.0.0.0/8"], "attempts": 1, "cache": f"{tmp_path}/cache"}
        tree = {"source": {"kind": "jsonl", "path": f"{tmp_path}/rows.jsonl"}, "output": f"{tmp_path}/out"}
        tree |= {"fetch": fetch, "images": {"min_side": 16}}
        build_here(**tree)
        asked = dict(web.asked)
        shown = pictures(Path(write_report(tmp_path / "out", build=make_config(**tree))).read_text())
        assert web.asked == asked  # nothing was fetched for the page
    sizes = {words.split()[0]: picture and picture.size for words, picture in shown.items()}
    assert (sizes["too_small"], sizes["http_404"]) == ((12, 12), None)


def test_duplicates_stand_beside_what_they_repeat(mixed, folder, make_config, tmp_path):
    tree = {"source": {"kind": "folder", "path": str(folder)}, "output": str(mixed)}
    text = Path(write_report(mixed, build=make_config(**tree))).read_text()
    assert "Duplicate images" in text and re.search(r"<td>2 times</td><td class=\"n\">1</td>", text)
    shown = pictures(text)
    [(stays, kept)] = [item for item in shown.items() if item[0].endswith(" stays")]
    [again] = [picture for words, picture in shown.items() if words.startswith("b/1: same bytes as row")]
    assert stays == "a/0 stays" and np.array_equal(np.asarray(kept), np.asarray(again))


@pytest.mark.slow
def test_the_report_of_an_older_version_tells_of_its_shards_alone(folder, build_here, make_png, tmp_path):
    tree = {"source": {"kind": "folder", "path": str(folder)}, "output": f"{tmp_path}/out", "shard_size": 4}
    first = build_here(**tree)["fingerprint"]
    (folder / "a/new.png").write_bytes(make_png(30))
    (folder / "a/new.txt").write_text("brand new")
    build_here(**tree, grow=True)
    old, new = (Path(write_report(f"{tmp_path}/out{at}")).read_text() for at in (f"@{first}", ""))
    assert "6 samples" in old and "brand new" not in old and first in old
    assert "7 samples" in new and "brand new" in new


class Patches:
    """A tokenizer of 4 x 4 mean greys."""

    id, image_size, codes_per_image, codebook_size = "0123456789ab", 16, 16, 256

    def encode(self, images):
        return images.reshape(-1, 4, 4, 4, 4, 3).mean((2, 4, 5)).astype(np.uint16).reshape(len(images), 16)

    def decode(self, values):
        return np.repeat(values.reshape(-1, 4, 4, 1), 3, -1).repeat(4, 1).repeat(4, 2).astype(np.uint8)


def test_codes_are_shown_with_their_use_and_reconstructions(scenes, monkeypatch):
    from data_pipeline.shards import codes

    def encode_here(job, manifest, *_):
        for shard in range(len(manifest.shards)):
            codes.encode_shard(job.dataset, shard, Patches())

    monkeypatch.setattr(codes, "_encode_shards", encode_here)
    codes.encode_dataset(scenes, lambda _: Patches(), "unused", progress=False)
    page = Page(Path(write_report(scenes, tokenizer=Patches())).read_text())
    used = len(np.unique(codes.read_codes(scenes, Patches.id)))
    assert f"{used} of 256 codes used" in " ".join(page.words)
    assert len(page.loaded) == 24 + 2 * 8


def test_a_report_of_nothing_is_refused(tmp_path, scenes):
    with pytest.raises(DataError, match="tessera data build"):
        write_report(tmp_path / "none")
    with pytest.raises(DataError, match="none/page.html: No such file or directory"):
        write_report(scenes, tmp_path / "none" / "page.html")
    assert "report.html" not in open_storage(scenes).list()


def test_a_page_replaces_an_earlier_one_and_no_other_file(tmp_path, scenes):
    page, mine = tmp_path / "page.html", tmp_path / "mine.html"
    write_report(scenes, page)
    written = page.read_bytes()
    write_report(scenes, page)
    assert page.read_bytes() == written
    mine.write_text("<html>mine</html>")
    for taken in (mine, tmp_path):
        with pytest.raises(DataError, match="is not a report; nothing was written, use another --output"):
            write_report(scenes, taken)
    assert mine.read_text() == "<html>mine</html>"


PROBE = """
const errors = []; addEventListener('error', event => errors.push(event.message), true);
addEventListener('load', () => document.title = JSON.stringify({
  pictures: [...document.images].map(image => image.naturalWidth), errors,
  loaded: performance.getEntriesByType('resource').map(entry => entry.name).filter(name => !name.startsWith('data:')),
  wider: document.documentElement.scrollWidth - innerWidth,
  bars: [...document.querySelectorAll('.bar')].map(bar => bar.getBoundingClientRect().width)}))
"""


@pytest.mark.real
@pytest.mark.slow
def test_a_browser_shows_every_picture_at_any_width_and_runs_nothing(mixed, folder, make_config, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        message = "chromium missing; as root: apt-get install --no-install-recommends chromium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    # what a browser made of the page: the width of each loaded picture, and whether anything of the data ran
    build = make_config(source={"kind": "folder", "path": str(folder)}, output=str(mixed))
    page = Path(write_report(mixed, build=build)).read_text()
    (tmp_path / "probe.html").write_text(page.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    for width in (1200, 500):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        command += [f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom"]
        done = subprocess.run(
            [*command, f"file://{tmp_path}/probe.html"], capture_output=True, text=True, timeout=90, check=True
        )
        seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
        # four samples, the rejected duplicate in the table, and beside what it repeats
        assert seen["pictures"] == [16] * 7 and seen["errors"] == [] and seen["loaded"] == []
        assert seen["wider"] <= 0, f"the page is {seen['wider']} pixels wider than a window of {width}"
        # bars are as long as their counts: 4 out, 1 and 1 rejected
        assert [round(bar / seen["bars"][0], 2) for bar in seen["bars"][:3]] == [1, 0.25, 0.25]
        assert "一只狗在海滩上奔跑&lt;b&gt;" in done.stdout

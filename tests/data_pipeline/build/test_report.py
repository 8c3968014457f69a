"""The report of a dataset, as text and as a real browser shows it."""

import html.parser
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build.report import write_report
from data_pipeline.errors import DataError
from data_pipeline.storage import open_storage


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
    assert "not_an_image" in words and "duplicate_image" in words and "the bytes of row" in words
    assert len(page.loaded) == 4 and all(address.startswith("data:image/jpeg;base64,") for address in page.loaded)
    assert "<script>alert(1)<" in words and "<script>" not in text and "http" not in re.sub(r"base64,\S+", "", text)
    assert re.search(r"zh\s+2", words)
    assert text == Path(write_report(mixed)).read_text()


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
    with pytest.raises(DataError, match="--output"):
        write_report(scenes, tmp_path / "none" / "page.html")
    assert "report.html" not in open_storage(scenes).list()


@pytest.mark.real
@pytest.mark.slow
def test_a_browser_shows_every_picture_and_runs_nothing(mixed, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        message = "chromium missing; as root: apt-get install --no-install-recommends chromium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    # what a browser made of the page: the width of each loaded picture, and whether anything of the data ran
    page = Path(write_report(mixed)).read_text()
    widths = "document.title=[...document.images].map(i=>i.naturalWidth).join()"
    probe = f"<script>addEventListener('load',()=>{{{widths}}})</script>"
    (tmp_path / "probe.html").write_text(page.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--virtual-time-budget=3000", "--dump-dom", f"file://{tmp_path}/probe.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=90).stdout
    assert re.search(r"<title>16,16,16,16</title>", shown), shown[:2000]
    assert "一只狗在海滩上奔跑&lt;b&gt;" in shown

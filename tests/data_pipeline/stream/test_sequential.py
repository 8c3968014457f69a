import functools
import http.server
import threading

import pytest

from data_pipeline.errors import DataError
from data_pipeline.stream import cache
from data_pipeline.stream.reader import Stream
from data_pipeline.stream.sequential import read_tars


@pytest.fixture
def site(scenes):
    """The scenes behind an http server that lacks ranges -> its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(scenes))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def seen(samples):
    return [(sample.key, sample.image, sample.texts, sample.meta) for sample in samples]


def test_tars_behind_http_are_read_in_sequence_and_split_between_ranks(scenes, site):
    stream = Stream(scenes, seed=0)
    everything = seen(stream.fetch(number) for number in range(25))
    pattern = f"{site}/{{00000..00001}}.tar::{site}/00002.tar"
    assert seen(read_tars(pattern)) == everything
    assert seen(read_tars(pattern, (1, 2))) == everything[10:20]
    assert seen(read_tars(f"{scenes}/00002.tar")) == everything[20:]


def test_a_tar_that_was_cut_between_its_files_is_named(scenes, site):
    path = scenes / "00001.tar"
    path.write_bytes(path.read_bytes()[:-1024])
    with pytest.raises(DataError, match="00001.tar: ends at byte .* without the closing blocks"):
        list(read_tars(f"{site}/00001.tar"))


def test_an_indexed_dataset_behind_a_server_without_ranges_says_what_to_use(site, monkeypatch, tmp_path):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "BLOCK_BYTES", 4096)
    with pytest.raises(DataError, match="lacks ranges; .*stream.sequential"):
        Stream(site, seed=0).fetch(9)

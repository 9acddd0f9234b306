"""Downloads over a server that breaks: what is whole gets its name, what is not is continued, refusals are said."""

import urllib.request

import pytest

from visft.errors import CheckpointError
from visft.model_zoo import download as module
from visft.model_zoo.download import NotThere, download

QUICK = {"pause": 0.01, "timeout": 5.0}


def get(url: str, path, **options) -> None:
    download(url, path, **{"check": lambda part: None, **QUICK, **options})


def only(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.fixture
def path(tmp_path):
    (tmp_path / "got").mkdir()
    return tmp_path / "got" / "f.pt"


def test_whole_file_gets_its_name_and_nothing_stays_beside_it(serve, content, path):
    server = serve({"f.pt": content})
    get(f"{server.url}/f.pt", path)
    assert path.read_bytes() == content and only(path.parent) == ["f.pt"]


def test_broken_half_way_is_continued_in_one_call(serve, content, path):
    server = serve({"f.pt": content}, ("half", "whole"))
    get(f"{server.url}/f.pt", path)
    first, second = server.seen
    assert "range" not in first
    assert (second["range"], second["if-range"]) == (f"bytes={len(content) // 2}-", '"1"')
    assert path.read_bytes() == content and server.sent == len(content)


def test_broken_again_and_again_ends_as_long_as_bytes_come(serve, content, path):
    server = serve({"f.pt": content}, ("half",))
    server.files["f.pt"] = content[:4096]
    get(f"{server.url}/f.pt", path, attempts=1)  # 13 times: half, a quarter, an eighth, ... the last byte
    assert path.read_bytes() == content[:4096] and len(server.seen) > 10


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(serve, content, path):
    server = serve({"f.pt": content}, ("third", "503"))
    with pytest.raises(CheckpointError, match="broke off .*status 503.*2 times in a row.*0.0 MB are kept"):
        get(f"{server.url}/f.pt", path, attempts=2)
    assert not path.exists()
    server.plan = ["whole"]
    get(f"{server.url}/f.pt", path)
    assert path.read_bytes() == content and server.sent == len(content)


def test_refused_ranges_begin_anew(serve, content, path):
    server = serve({"f.pt": content}, ("half", "no ranges"))
    get(f"{server.url}/f.pt", path)
    assert path.read_bytes() == content and server.sent == len(content) * 3 // 2


def test_a_server_that_always_begins_anew_and_breaks_is_given_up(serve, content, path):
    server = serve({"f.pt": content}, ("half no ranges", "third no ranges"))
    server.plan = ["half no ranges", "third no ranges"] * 20
    with pytest.raises(CheckpointError, match="3 times in a row"):
        get(f"{server.url}/f.pt", path, attempts=3)
    assert not path.exists() and len(server.seen) == 4


@pytest.mark.parametrize("how", ["changed", "whole nameless", "whole weak"])
def test_bytes_of_another_version_are_not_glued_together(serve, content, path, how):
    """The file was replaced meanwhile; or the server has no strong name for what it sent first."""
    first = "half" if how == "changed" else how.replace("whole", "half")
    server = serve({"f.pt": content}, (first, how))
    get(f"{server.url}/f.pt", path)
    assert path.read_bytes() == (content[::-1] if how == "changed" else content)
    assert ("range" in server.seen[1]) == (how == "changed")
    assert server.sent == len(content) * 3 // 2


def test_another_range_than_asked_for_is_not_used(serve, content, path):
    server = serve({"f.pt": content}, ("half", "shifted", "whole"))
    get(f"{server.url}/f.pt", path)
    assert path.read_bytes() == content and "range" not in server.seen[2]


def test_killed_between_the_last_byte_and_the_name(serve, content, path):
    server = serve({"f.pt": content}, ("half", "503"))
    with pytest.raises(CheckpointError):
        get(f"{server.url}/f.pt", path, attempts=1)
    part = path.with_name(".f.pt.download")
    part.write_bytes(content)  # now all of it is there; the server answers 416
    server.plan = ["whole"]
    get(f"{server.url}/f.pt", path)
    assert path.read_bytes() == content and server.sent == len(content) // 2


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("404", NotThere, "no such file .*404"),
        ("410", NotThere, "no such file .*410"),
        ("401", CheckpointError, "may not be downloaded .*401.*HF_TOKEN"),
        ("403", CheckpointError, "may not be downloaded .*403"),
        ("400", CheckpointError, "status 400"),
        ("page", CheckpointError, "a web page instead of f.pt"),
        ("huge", CheckpointError, "needs 10000000000.0 MB more in .*VISFT_CACHE"),
    ],
)
def test_refusals_are_said_at_once(serve, content, path, how, error, words):
    server = serve({"f.pt": content}, (how,))
    with pytest.raises(error, match=words) as raised:
        get(f"{server.url}/f.pt", path)
    assert f"{server.url}/f.pt" in str(raised.value) and len(server.seen) == 1 and not path.exists()


@pytest.mark.parametrize("how", ["500", "503", "429", "hang up"])
def test_passing_troubles_are_tried_again(serve, content, path, how):
    server = serve({"f.pt": content}, (how, how, "whole"))
    get(f"{server.url}/f.pt", path)
    assert path.read_bytes() == content and len(server.seen) == 3


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_and_ranges_with_them(serve, content, path, status):
    target = serve({"f.pt": content}, ("half", "whole"))
    server = serve({"f.pt": content}, (f"redirect:{status}:http://localhost:{target.server_port}/far/",))
    get(f"{server.url}/f.pt", path, headers={"Authorization": "Bearer secret"})
    assert path.read_bytes() == content
    assert [request["path"] for request in target.seen] == ["/far/f.pt"] * 2
    assert target.seen[1]["range"] == f"bytes={len(content) // 2}-"
    assert all(request["authorization"] == "Bearer secret" for request in server.seen)
    assert not any("authorization" in request for request in target.seen)


def test_redirects_in_a_circle_end(serve, content, path):
    server = serve({"f.pt": content}, ("redirect:302:/",))
    with pytest.raises(CheckpointError, match="infinite loop"):
        get(f"{server.url}/f.pt", path)
    assert not path.exists()


def test_redirects_never_leave_encryption():
    request = urllib.request.Request("https://host/f.pt")
    with pytest.raises(
        CheckpointError, match="https://host/f.pt: redirects to http://other/f.pt, .*not encrypted"
    ):
        module._Redirects().redirect_request(request, None, 302, "Found", {}, "http://other/f.pt")


def test_silence_is_a_broken_connection(serve, content, path):
    server = serve({"f.pt": content}, ("half stall", "whole"))
    get(f"{server.url}/f.pt", path, timeout=0.3)
    assert path.read_bytes() == content and server.sent == len(content)
    path.unlink()
    server.plan = ["half stall", "hang up"]
    with pytest.raises(CheckpointError, match="broke off"):
        get(f"{server.url}/f.pt", path, timeout=0.3, attempts=2)
    assert not path.exists()


def test_nobody_answers(serve, content, path):
    server = serve({"f.pt": content})
    url = f"{server.url}/f.pt"
    server.shutdown()
    server.server_close()
    with pytest.raises(CheckpointError, match="broke off .no connection.*2 times"):
        get(url, path, attempts=2)


def test_another_size_than_published_is_not_downloaded(serve, content, path):
    server = serve({"f.pt": content})
    with pytest.raises(CheckpointError, match=f"has {len(content)} bytes, f.pt should have 7"):
        get(f"{server.url}/f.pt", path, size=7)
    assert only(path.parent) == []


def test_what_the_check_refuses_leaves_nothing(serve, content, path):
    server = serve({"f.pt": content})

    def refuse(part):
        assert part.read_bytes() == content and not path.exists()
        raise CheckpointError("another hash")

    with pytest.raises(CheckpointError, match="another hash"):
        get(f"{server.url}/f.pt", path, check=refuse)
    assert only(path.parent) == []


def test_a_server_that_does_not_say_how_long_the_file_is(serve, content, path):
    server = serve({"f.pt": content, "e.pt": b""}, ("unknown length",))
    get(f"{server.url}/f.pt", path)
    assert path.read_bytes() == content
    with pytest.raises(CheckpointError, match="is empty"):
        get(f"{server.url}/e.pt", path.with_name("e.pt"))
    assert only(path.parent) == ["f.pt"]


@pytest.mark.parametrize("url", ["http://[f.pt", "http://host:port/f.pt"])
def test_no_address(path, url):
    with pytest.raises(CheckpointError, match="is no address"):
        get(url, path)

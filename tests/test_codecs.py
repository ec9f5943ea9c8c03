"""Section 5: lines, chunks, JSON and events, however the bytes are cut."""
import pytest

from qwencode import (
    ChunkDecoder,
    Event,
    LineSplitter,
    UpstreamBrokenError,
    clean,
    json_lines,
    parse_json,
    redact,
    sse,
)


def cuts(data):
    """The data whole, by bytes, and in threes."""
    return [[data[i:i + size] for i in range(0, len(data), size)] for size in (len(data), 1, 3)]


@pytest.mark.parametrize("data", [b"a\nbc\n\nd", b"no line end", b"\n", b"a\r\nb\n"])
def test_lines_are_the_same_however_they_are_cut(data):
    for pieces in cuts(data):
        splitter = LineSplitter()
        whole = b"".join(splitter.feed(piece) for piece in pieces)
        assert (whole, splitter.rest()) == (data[:data.rfind(b"\n") + 1],
                                            data[data.rfind(b"\n") + 1:])


def test_an_endless_line_is_given_up(monkeypatch):
    monkeypatch.setattr("qwencode.MAX_LINE_BYTES", 10)
    splitter = LineSplitter()
    assert splitter.feed(b"0123456789") == b""
    with pytest.raises(UpstreamBrokenError):
        splitter.feed(b"x")


LINE = '{"a":1}\n'
JSON_LINES = [
    ("", [], ""), ("\n", [], ""), (LINE, [{"a": 1}], ""), (LINE * 9, [{"a": 1}] * 9, ""),
    (LINE * 9 + "\r\n\n" + LINE, [{"a": 1}] * 10, ""),
    ('{"a":\n1}\n' * 6, [{"a": 1}] * 6, ""),
    (LINE * 6 + "%%\n" + LINE, [{"a": 1}] * 6, "%%\n" + LINE),
    (LINE * 6 + '{"a":NaN}\n', [{"a": 1}] * 6, '{"a":NaN}\n'),
    (LINE * 6 + "1,2\n", [{"a": 1}] * 6 + [1], ",2\n"),
    (LINE * 6 + "[1\n2]\n", [{"a": 1}] * 6, "[1\n2]\n"),
    (LINE * 6 + "[" * 9999 + "\n", [{"a": 1}] * 6, "[" * 9999 + "\n"),
]


@pytest.mark.parametrize(("text", "values", "rest"), JSON_LINES)
def test_many_lines_are_read_as_each_alone(text, values, rest):
    assert json_lines(text) == (values, rest)


@pytest.mark.parametrize(("data", "payload", "rest"), [
    (b"3\r\nabc\r\n0\r\n\r\n", b"abc", b""),
    (b"3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nTrailer: 1\r\n\r\nGET /", b"abc0123456789", b"GET /"),
    (b"0\r\n\r\n", b"", b""),
])
def test_chunks_are_joined(data, payload, rest):
    for pieces in cuts(data):
        decoder = ChunkDecoder()
        got = b"".join(decoder.feed(piece) for piece in pieces if not decoder.finished)
        assert decoder.finished
        assert got == payload
        if len(pieces) == 1:
            assert decoder.rest == rest


@pytest.mark.parametrize("data", [
    b"x\r\n", b"-1\r\nabc", b"0x3\r\nabc\r\n", b"3\r\nabcXX0\r\n\r\n", b"3\nabc\n0\n\n" + b"0" * 300,
    b"+3\r\nabc\r\n", b" 3\r\nabc\r\n", b"1" * 20 + b"\r\n", b"3\r\nabc\n\n", b"\r\n",
    b"3;a\nb\r\nabc\r\n",
])
def test_bad_chunks_are_refused(data):
    decoder = ChunkDecoder()
    with pytest.raises(ValueError, match="chunk"):
        decoder.feed(data)


@pytest.mark.parametrize("data", [
    b"", b"{", b"{\"a\":NaN}", b"[1e999999, Infinity]", b"\xff", b"[" * 100_000, b"\xef\xbb\xbf{}",
    b"{\"a\": 01}", b"1" * 5000,
])
def test_what_is_no_json_raises_value_error(data):
    with pytest.raises(ValueError, match="."):
        parse_json(data)


def test_lone_surrogates_are_json():
    assert parse_json(b'{"a":"\\ud800"}') == {"a": "\ud800"}


def test_events_are_written_one_block_each_and_cannot_be_broken_out_of():
    text = "a\n\nevent: x\r\n\u2028\ud800"
    assert sse([Event("ping", {"t": text})]) == (
        b'event: ping\ndata: {"t":"a\\n\\nevent: x\\r\\n\\u2028\\ud800"}\n\n')


@pytest.mark.parametrize(("text", "cleaned"), [
    ("a\r\nb\x1b[31m", "a  b [31m"), ("x" * 400, "x" * 300 + "…"), ("\ud800", "\ufffd"),
    ("\x9bok\u2028", " ok "),
])
def test_foreign_text_is_cleaned_for_the_log(text, cleaned):
    assert clean(text) == cleaned


def test_secrets_are_taken_out():
    assert redact("key abc and Basic abc", ("abc",)) == "key [secret] and Basic [secret]"

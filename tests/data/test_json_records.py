import json

import pytest

from llava_mini.data import json_records
from llava_mini.data.json_records import read_record, scan_records

RECORDS = [
    {"id": "a", "text": "plain", "deep": [{"x": [1, 2]}, {}]},
    {"id": "b", "text": 'quotes " and \\ and ]},[{ brackets'},
    {"id": "c", "text": "caf\u00e9 \u4f60\u597d \U0001f600"},
    {"id": "d", "text": "x" * 500},
    7,
    None,
]


@pytest.fixture(params=[1, 7, 1 << 22])
def window(request, monkeypatch):
    """Windows of a byte or a few cut records anywhere."""
    monkeypatch.setattr(json_records, "WINDOW", request.param)


def found_in(path):
    return [(record, read_record(path, start, size)) for start, size, record in scan_records(path)]


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_every_record_of_a_list_is_found_where_it_lies(tmp_path, indent, ascii_only, mark, line_end):
    path = tmp_path / "records.json"
    text = json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only).encode() + b"\n"
    path.write_bytes(mark + text.replace(b"\n", line_end))
    assert found_in(path) == [(record, record) for record in RECORDS]


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\n\n \n"])
def test_every_record_of_lines_is_found_where_it_lies(tmp_path, mark, line_end):
    path = tmp_path / "records.jsonl"
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in RECORDS]
    path.write_bytes(mark + line_end.join(lines))
    assert found_in(path) == [(record, record) for record in RECORDS]


def test_the_content_tells_lines_from_a_list_not_the_name(tmp_path):
    (tmp_path / "lines.json").write_text('{"id": 1}\n{"id": 2}')
    (tmp_path / "list.jsonl").write_text('[{"id": 1},{"id": 2}]')
    for name in ("lines.json", "list.jsonl"):
        assert [record["id"] for _, _, record in scan_records(tmp_path / name)] == [1, 2]


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"id": 1}, {"id": ', "begins: .*cut off"),
        (b'[{"id": 1}, {"text": "no end', "begins: Unterminated string"),
        (b'[{"id": 1}', "its end.* after record 0, at byte 10"),
        (b'[{"id": 1} {"id": 2}]', "'{' after record 0, at byte 11"),
        (b'[{"id": 1},]', "from byte 11 on, where its record 1 begins"),
        (b"[", "from byte 1 on"),
        (b'[{"id": 1}]\n[{"id": 2}]', r"goes on with '\[' after its list"),
        (b'[] {"id": 1}', "goes on with '{' after its list"),
        (b'[{"id": wrong' + b" " * 100 + b'}, {"id": 2}]', "its record 0 begins: Expecting value"),
        (b"[" * 100_000, "record 0 begins"),
        (b"hello", "begins with 'h'"),
        (b"", "begins with ''"),
        (b" \n\n ", "begins with ''"),
        (b"\xff\xfe[\x00]\x00", "UTF-16"),
        (b'{\n  "id": 1\n}', "None of the 3 lines .* one object over several lines"),
    ],
)
def test_a_file_that_cannot_be_read_to_its_end_is_refused_with_the_place(tmp_path, content, reason):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        list(scan_records(tmp_path / "bad.json"))


def test_an_empty_list_has_no_records(tmp_path):
    (tmp_path / "empty.json").write_text(" [ ] ")
    assert list(scan_records(tmp_path / "empty.json")) == []


@pytest.mark.parametrize("bad", [b"{broken", b'{"text": "\xff"}', b'{"n": ' + b"9" * 5000 + b"}"])
def test_a_bad_line_is_a_record_that_says_so_when_it_is_read(tmp_path, bad):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"id": 1}\n' + bad + b'\n{"id": 3}\n')
    found = list(scan_records(path))
    assert [record for _, _, record in found] == [{"id": 1}, None, {"id": 3}]
    with pytest.raises(ValueError, match="at byte 10 of .* is no JSON in UTF-8"):
        read_record(path, *found[1][:2])


def test_a_record_of_a_list_that_is_not_utf8_is_a_bad_record_alone(tmp_path):
    path = tmp_path / "list.json"
    path.write_bytes(b'[{"id": 1}, {"text": "\xff"}, {"id": 3}]')
    assert [record for _, _, record in scan_records(path)] == [{"id": 1}, None, {"id": 3}]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no data file .*absent.json"):
        list(scan_records(tmp_path / "absent.json"))

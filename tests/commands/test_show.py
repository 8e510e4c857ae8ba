"""`deft show`: every token is seen, coloured as it is learnt; what rows say cannot act on the terminal or the page."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from encoders import chat, row_encoder, source
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_models import write_llama
from tiny_tokenizers import CHATML, byte_level, sentencepiece

import deft
from deft.commands.show import page, rows, terminal
from deft.commands.show.rows import Shown, Wanted
from deft.commands.show.tokens import LEARNT, SPECIAL, UNLEARNT, TokenTexts, shade, visible
from deft.core.types import Fate
from deft.dataset import build
from deft.encoding import tokenizer as edge

HOSTILE = (
    "</script><script>document.title='owned'</script ><img src=x onerror='document.title=0'></script x=<!--<script"
)
ESCAPES = "\x1b]0;owned\x07\x1b[31mred\x9b2J \u202eright to left\u200b\r"
FACTS = {"model": "tiny", "template": "chats by a test's template"}


def shown(*values: Any, wanted: Wanted | None = None, share: float = 0.0, **policy: Any) -> Shown:
    return rows.show([source(*values)], [], row_encoder(**policy), share, 0, wanted or Wanted(100))


def printed(found: Shown, width: int = 80, **settings: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **settings)
    terminal.write(console, found)
    return console.file.getvalue()  # type: ignore[attr-defined]


def coloured(found: Shown, width: int = 200) -> list[tuple[str, Any]]:
    """(text, style) of all that is printed in colour."""
    console = Console(
        file=io.StringIO(), width=width, record=True, force_terminal=True, color_system="truecolor", no_color=False
    )
    terminal.write(console, found)
    return [(segment.text, segment.style) for segment in console._record_buffer if segment.text.strip("\n")]


# What a token writes


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["byte_level", "sentencepiece"])
@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\ufffd▁"), min_size=1, max_size=30)
)
def test_the_texts_of_all_tokens_are_the_text(tokenizer: Any, text: str) -> None:
    held = edge.wrap(tokenizer)
    ids = held.literal(text, continues=True)
    texts = TokenTexts(held).texts(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


def test_a_space_in_front_of_a_token_is_kept() -> None:
    for tokenizer in (byte_level(), sentencepiece()):
        held = edge.wrap(tokenizer)
        (space,) = held.literal(" the", continues=True)[:1]
        assert TokenTexts(held).texts([space])[0][0] == " "


def test_a_character_of_several_tokens_stands_with_the_last_of_them() -> None:
    held = edge.wrap(byte_level())
    assert TokenTexts(held).texts(held.ids("a🎉b")) == ["a", "", "", "", "🎉", "b"]


def test_bytes_that_are_no_character_are_shown_and_the_next_token_is_whole() -> None:
    held = edge.wrap(byte_level())
    (half, *_), (letter,) = held.ids("🎉"), held.ids("a")
    assert TokenTexts(held).texts([half] * 20 + [letter])[0] == "\ufffd"
    assert "".join(TokenTexts(held).texts([half, letter])) == "\ufffda"


def test_what_has_no_sign_gets_one() -> None:
    assert visible(ESCAPES) == "␛]0;owned␇␛[31mred⟨9B⟩2J ⟨202E⟩right to left⟨200B⟩␍"
    assert visible("\u2028\ufeff") == "⟨2028⟩⟨FEFF⟩"


# Which rows


MIXED = [
    chat("Hi", "Hello"),
    {"messages": [{"role": "user", "content": "Hi"}]},
    chat("Hi", "Hello " * 100),
    chat("Hi", "Hello", weight=0),
    chat("What?", "That."),
]


def test_rows_come_in_their_order_with_their_fates_refused_ones_among_them() -> None:
    found = shown(*MIXED, max_length=100)
    assert [(row.origin.line, row.fate.value) for row in found.rows] == [
        (1, "trained"),
        (2, "refused"),
        (3, "too_long"),
        (4, "no_target"),
        (5, "trained"),
    ]
    assert found.rows[1].reason.startswith("messages: no assistant message")
    assert found.rows[2].words == (("user", "Hi"), ("assistant", ("Hello " * 100)))
    assert (found.looked_at, found.total) == (5, 5)


def test_rows_are_chosen_by_number_fate_line_and_source() -> None:
    def lines(wanted: Wanted) -> list[int]:
        return [row.origin.line for row in shown(*MIXED, wanted=wanted, max_length=100).rows]

    assert lines(Wanted(2)) == [1, 2]
    assert lines(Wanted(9, only=Fate.TRAINED)) == [1, 5]
    assert lines(Wanted(9, from_line=4)) == [4, 5]
    assert lines(Wanted(9, source="rows.jsonl")) == [1, 2, 3, 4, 5]
    assert lines(Wanted(9, source="other.jsonl")) == []
    assert shown(*MIXED, wanted=Wanted(1), max_length=100).looked_at == 1, "no more is encoded than is shown"


def test_what_is_shown_is_what_is_trained() -> None:
    values = [
        chat("Hi", "Hello"),
        chat("What?", "That.", weight=0.5),
        {"messages": [{"role": "user", "content": "Hi"}]},
    ]
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    batch = deft.encode(values, tokenizer)
    tokenizer.chat_template = None
    texts = [text for row in shown(*values).rows for text in row.texts]
    assert len(texts) == len(batch) == 2
    for text, encoded in zip(texts, batch, strict=True):
        assert [token.id for token in text] == encoded.tokens.tolist()
        assert [token.weight for token in text] == encoded.weights.tolist()


def test_the_first_token_of_a_text_is_learnt_by_nobody() -> None:
    (row,) = shown(chat("Hi", "Hello"), train_on="all").rows
    assert row.texts[0][0].weight == 0
    assert all(token.weight == 1 for token in row.texts[0][1:])


def test_held_out_drawn_and_evaluated_rows_have_the_fates_of_training() -> None:
    values = [chat("Hi", f"{n}") for n in range(20)]
    train = source(*values, times=0.5, loss_weight=0.25)
    evaluated = source(values[3], name="eval.jsonl")
    found = rows.show([train], [evaluated], row_encoder(), 0.0, 0, Wanted(100))
    data, _ = build.encode_sources([train], row_encoder(), held_out=[evaluated]).ledgers
    fates = {fate.value: sum(row.fate == fate for row in found.rows[:20]) for fate in Fate}
    assert fates == data.fates
    assert fates["left_out"] in (9, 10)
    assert fates["held_out"] == 1
    weights = {token.weight for row in found.rows[:20] for text in row.texts for token in text}
    assert weights == {0.0, 0.25}
    assert found.rows[20].fate == Fate.HELD_OUT


def test_a_long_row_says_how_much_of_it_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SHOWN_TOKENS", 10)
    found = shown("the cat sat on the mat " * 9, max_length=16)
    assert sum(map(len, found.rows[0].texts)) == 10
    assert f"and {found.rows[0].tokens - 10} more tokens" in printed(found)


# The terminal


def test_without_colour_bars_stand_between_tokens_and_brackets_around_what_is_learnt() -> None:
    text = printed(shown(chat("Hi", "Hello", weight=0.5)))
    assert "<|im_start|>│user│↵\n" in text
    assert re.search(r"⟦H.*o│<\|im_end\|>⟧0\.5", text)
    assert re.search(r"rows\.jsonl:1  messages  trained  \d+ tokens, \d+ learnt", text)
    assert text.endswith("1 of 1 rows\n")


def test_colours_follow_the_weights_and_neighbours_differ() -> None:
    found = coloured(shown(chat("Hi there", "Hello there", weight=1), chat("Hi", "Hello", weight=0.5)))
    backgrounds = {str(style.bgcolor.name) for _, style in found if style and style.bgcolor}
    half = shade(0.5)
    expected = {LEARNT.first, LEARNT.second, UNLEARNT.first, UNLEARNT.second, half.first, half.second}
    assert backgrounds == expected
    control = [style for text, style in found if text == "<|im_end|>"]
    assert len(control) == 4
    assert all(style.color.name == SPECIAL and style.bold for style in control)
    assert {style.bgcolor.name for style in control} & {LEARNT.first, LEARNT.second}, "the stop is learnt"


def test_every_token_has_its_own_shade() -> None:
    found = shown(["the cat sat on the mat", " Hello there, how can I help you today?"])
    painted = [(text, style.bgcolor.name) for text, style in coloured(found) if style and style.bgcolor]
    tokens = [visible(token.text) for token in found.rows[0].texts[0]]
    runs = painted[-len(tokens) :]
    assert [text for text, _ in runs] == tokens
    assert all(a != b for (_, a), (_, b) in pairwise(runs))


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from("ab  \n\t中🎉é"), min_size=1, max_size=60), width=st.integers(5, 40))
def test_no_character_and_no_space_is_lost_at_the_end_of_a_line(text: str, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    (row,) = shown({"prompt": "Hi", "completion": text or "a"}).rows
    lines = [line.plain for line in terminal._laid_out(terminal._coloured(row.texts[0]), width)]
    assert all(console.measure(line).maximum <= width for line in lines)
    assert "".join(lines) == "".join(visible(token.text) for token in row.texts[0]).replace("\n", "")


def test_no_control_character_of_a_row_reaches_the_terminal() -> None:
    refused = {"messages": [{"role": "user", "content": ESCAPES}]}
    too_long = chat(ESCAPES, ESCAPES * 20)
    text = printed(shown(chat(ESCAPES, ESCAPES), refused, too_long, max_length=200))
    assert not set(text) & {"\x1b", "\x07", "\x9b", "\u202e", "\u200b", "\r"}
    assert text.count("␛") > 4


def test_symptoms_stand_with_their_row() -> None:
    assert "note: has special tokens in a message; they are encoded as text" in printed(
        shown(chat("</s>", "Hello")), 200
    )


# The page


class Parsed(HTMLParser):
    """Elements with their attributes, and the text in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def parsed(found: Shown) -> Parsed:
    return Parsed(page.page(found, FACTS, 500))


def data_of(found: Parsed) -> dict[str, Any]:
    return json.loads(found.texts["script"][0])  # type: ignore[no-any-return]


def test_the_page_holds_every_row_and_token() -> None:
    found = shown(*MIXED, max_length=100)
    data = data_of(parsed(found))
    assert [row["row"] for row in data["rows"]] == [f"rows.jsonl:{line}" for line in range(1, 6)]
    for row, listed in zip(found.rows, data["rows"], strict=True):
        assert (listed["fate"], listed["tokens"], listed["learnt"]) == (row.fate.value, row.tokens, row.learnt)
        for text, given_text in zip(row.texts, listed["texts"], strict=True):
            grades = [data["weights"][grade] for grade, count in given_text["weights"] for _ in range(count)]
            kinds = [data["kinds"][kind] for kind in given_text["kinds"]]
            assert grades == [token.weight for token in text]
            assert kinds == [[token.id, visible(token.text), int(token.is_special)] for token in text]


def test_the_page_has_its_controls_and_counts_and_fetches_nothing() -> None:
    found = parsed(shown(*MIXED, max_length=100))
    ids = {attributes.get("id") for _, attributes in found.elements}
    assert {"previous", "next", "place", "source", "fate", "shortest", "longest", "row", "legend", "tip"} <= ids
    options = [attributes["value"] for attributes in found.all("option")]
    assert options == ["", "rows.jsonl", "", "trained", "too_long", "no_target", "refused"]
    assert "5 of 5 rows, at most 500" in "".join(found.texts["p"])
    cells = found.texts["td"]
    assert cells[:9] == ["rows.jsonl", "5", "2", "0", "0", "0", "1", "1", "1"]
    for name, attributes in found.elements:
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes), name
    assert not any(word in page.page(shown("a b"), FACTS, 1) for word in ("http://", "https://", "@import", "url("))


def test_only_the_page_s_own_script_and_style_may_run() -> None:
    found = parsed(shown(chat(HOSTILE, HOSTILE)))
    (policy,) = (each["content"] for each in found.all("meta") if "http-equiv" in each)
    assert policy is not None
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        digest = base64.b64encode(hashlib.sha256(found.texts[tag][-1].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_hostile_rows_and_names_stay_text() -> None:
    named = rows.show([source(chat(HOSTILE, HOSTILE), name=f"{HOSTILE}.jsonl")], [], row_encoder(), 0.0, 0, Wanted(9))
    found = Parsed(page.page(named, {"model": HOSTILE, "template": HOSTILE}, 9))
    calm = Parsed(page.page(shown(chat("a", "b")), FACTS, 9))
    assert [tag for tag, _ in found.elements if tag != "span"] == [tag for tag, _ in calm.elements if tag != "span"]
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    (row,) = data_of(found)["rows"]
    assert row["row"] == f"{HOSTILE}.jsonl:1"
    kinds = data_of(found)["kinds"]
    assert HOSTILE in "".join(kinds[kind][1] for kind in row["texts"][0]["kinds"])


def test_the_same_rows_give_the_same_page() -> None:
    assert page.page(shown(*MIXED), FACTS, 5) == page.page(shown(*MIXED), FACTS, 5)


def test_weights_are_in_the_legend_and_each_has_its_colours() -> None:
    found = parsed(shown(chat("Hi", "Hello", weight=0.25), chat("Hi", "Hello", weight=3)))
    assert data_of(found)["weights"] == [0.0, 0.25, 1.0, 3.0]
    legend = [text for text in found.texts["span"] if text.strip()]
    assert legend[:4] == ["not learnt", "weight 0.25", "learnt", "weight 3"]
    style = found.texts["style"][0]
    assert all(
        f".w{index} {{ --text: {shade(weight).text}" in style for index, weight in enumerate((0.0, 0.25, 1.0, 3.0))
    )


def in_a_browser(folder: Path, text: str, fragment: str = "") -> Parsed:
    """The page as a browser has it once its scripts have run."""
    if shutil.which("chromium") is None:
        pytest.skip("no chromium here")
    (folder / "page.html").write_text(text, encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", f"file://{folder / 'page.html'}{fragment}"]
    return Parsed(subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout)


def test_a_browser_shows_the_rows_and_runs_nothing_of_theirs(tmp_path: Path) -> None:
    refused = {"messages": [{"role": "user", "content": HOSTILE}], "tools": HOSTILE}
    rows_shown = shown(chat("Hi", "Hello"), chat(HOSTILE, HOSTILE), refused, chat("Hi", HOSTILE * 9))
    text = page.page(rows_shown, FACTS, 9)
    for line in (4, 3, 2):
        found = in_a_browser(tmp_path, text, f"#rows.jsonl%3A{line}")
        assert found.texts["title"] == ["What is learnt: tiny"]
        assert found.texts["output"] == [f"{line} of 4"]
        assert found.all("img") == []
    tokens = [each for each in found.all("span") if (each.get("class") or "").startswith("token")]
    assert len(tokens) > 40


def test_keys_buttons_filters_and_the_token_s_own_numbers_work_in_a_browser(tmp_path: Path) -> None:
    long = chat("Hi", "the cat sat on the mat " * 3)
    text = page.page(shown(chat("Hi", "Hello"), MIXED[1], chat("Hi", "Hello", weight=0.5), long), FACTS, 9)
    steps = """<script>
        const seen = [];
        const look = () => seen.push(place.textContent + " " + panel.querySelector("h2").firstChild.textContent);
        const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        const set = (id, value) => {
          document.getElementById(id).value = value;
          document.getElementById(id).dispatchEvent(new Event("input"));
        };
        press("ArrowRight"); look(); next.click(); look(); press("End"); look(); previous.click(); look();
        press("Home"); look(); set("fate", "trained"); look(); press("ArrowRight"); look();
        set("longest", "20"); press("ArrowRight"); press("ArrowRight"); look();
        const spans = panel.querySelectorAll(".token");
        spans[spans.length - 1].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
        document.title = seen.join(", ");
    </script></body>"""
    free = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", steps)
    found = in_a_browser(tmp_path, free)
    row = "rows.jsonl:"
    assert found.texts["title"][0].split(", ") == [
        *(f"2 of 4 {row}2", f"3 of 4 {row}3", f"4 of 4 {row}4", f"3 of 4 {row}3"),
        *(f"1 of 4 {row}1", f"1 of 3 {row}1", f"2 of 3 {row}3", f"2 of 2 {row}3"),
    ]
    (mark,) = byte_level().convert_tokens_to_ids(["<|im_end|>"])
    tip = found.texts["div"][0]
    assert re.fullmatch(rf'position \d+\nid {mark}\ntext "<\|im_end\|>"\nweight 0.5', tip), tip


# The command


def command(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "deft", "show", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, **settings)


def test_a_data_file_needs_no_more_than_a_tokenizer(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [chat("Hi", "Hello"), {"messages": []}]))
    done = command(str(data), f"model={tmp_path / 'tokenizer'}", "--html", str(tmp_path / "page.html"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'page.html'}: 2 of 2 rows\n"), done.stderr
    assert [row["fate"] for row in data_of(Parsed((tmp_path / "page.html").read_text()))["rows"]] == [
        "trained",
        "refused",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "rows.jsonl", "page.html"}


def test_a_configuration_is_shown_as_it_would_be_trained(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", chat_template=CHATML)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(chat("Hi", f"Hello {n}")) + "\n" for n in range(4)))
    (tmp_path / "run.yaml").write_text(f"model: {model}\ndata: {{train: {tmp_path / 'rows.jsonl'}, train_on: all}}\n")
    done = command(str(tmp_path / "run.yaml"), "--rows", "1", "--from", "3", "--only", "trained")
    assert done.returncode == 0, done.stderr
    assert "rows.jsonl:3" in done.stdout
    assert "⟦" in done.stdout.split("rows.jsonl:3")[1].split("user")[0], "train_on: all learns the first tokens too"
    assert "1 of 4 rows" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl", "model=none"], "none.jsonl"),
        (["rows.jsonl"], "model: missing"),
        (["rows.jsonl", "model=tokenizer", "--only", "trian"], "'trian' is no fate; one of trained"),
        (["rows.jsonl", "model=tokenizer", "--source", "b.jsonl"], "there are rows.jsonl"),
        (["run.yaml", "rows.jsonl"], "one configuration file, or data files"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    byte_level().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat("Hi", "Hello")))
    done = command(*arguments, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert message in done.stderr


def test_the_picture_of_the_readme_is_drawn_from_what_show_prints() -> None:
    root = Path(__file__).parents[2]
    drawn = subprocess.run(
        [sys.executable, root / "examples" / "picture_of_show.py", "/dev/stdout"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert drawn.startswith("<svg")
    assert "@font-face" not in drawn
    kept = (root / "docs" / "show.svg").read_text(encoding="utf-8")
    assert len(kept) < 100_000
    assert drawn.startswith(kept), "draw it again: python examples/picture_of_show.py"

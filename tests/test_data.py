"""Training text: packing, sources, and what a teacher writes."""

import copy

import pytest
import torch
from families import load
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_littlebit.train import documents
from hf_littlebit.train.data import TokenBlocks, _draw, _sample, sample_blocks, text_blocks
from hf_littlebit.train.documents import read_texts


@pytest.fixture(scope="module")
def tokenizer(stories):
    return AutoTokenizer.from_pretrained(stories)


TEXTS = ["Once upon a time there was a cat.", "The dog ran.", "", "A bird sang all day in the big tree."]


def test_blocks_hold_every_token_in_order(tokenizer):
    stream = []
    for text in TEXTS:
        stream += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    blocks = text_blocks(TEXTS, tokenizer, 8)
    assert len(blocks) == len(stream) // 8
    assert blocks.tokens.flatten().tolist() == stream[: 8 * len(blocks)]
    row = blocks[1]
    assert torch.equal(row["input_ids"], row["labels"]) and row["labels"].dtype is torch.int64
    assert len(text_blocks(TEXTS * 100, tokenizer, 8, max_blocks=5)) == 5


def test_blocks_of_rows_and_errors(tokenizer):
    rows = [{"body": text, "id": 1} for text in TEXTS]
    assert torch.equal(text_blocks(rows, tokenizer, 8, "body").tokens, text_blocks(TEXTS, tokenizer, 8).tokens)
    with pytest.raises(ValueError, match="no column 'text'; its columns are body, id"):
        text_blocks(rows, tokenizer, 8)
    with pytest.raises(ValueError, match="fewer than one block of 4096"):
        text_blocks(TEXTS, tokenizer, 4096)
    with pytest.raises(ValueError, match="length is 1"):
        text_blocks(TEXTS, tokenizer, 1)


def test_a_long_document_is_tokenized_in_parts(tokenizer, monkeypatch):
    """As if it were whole, but for the blank that this tokenizer puts in front of every part; and no more of it than is wanted."""
    lines = "".join(f"{TEXTS[0]} {number} times.\n" for number in range(400))
    whole = text_blocks([lines, "The end of it."], tokenizer, 8).tokens.flatten()
    monkeypatch.setattr(documents, "CHARACTERS", 5000)
    monkeypatch.setattr(documents, "WITHIN", 200)
    parts = list(documents.document_parts([lines, "", "The end of it."]))
    assert [[begins for begins, _ in each] for each in parts] == [[True], [False], [False], [False, True, True]]
    texts = [text for each in parts for _, text in each]
    assert "".join(texts) == lines + "The end of it." and all(text.endswith("\n") for text in texts[:4])
    found = text_blocks([lines, "The end of it."], tokenizer, 8).tokens.flatten()
    assert abs(len(found) - len(whole)) <= 16 and torch.equal(found[:500], whole[:500])
    taken = []
    stream = (taken.append(number) or lines for number in range(9))
    assert len(text_blocks(stream, tokenizer, 8, max_blocks=20)) == 20 and taken == [0]


@pytest.mark.parametrize("text", ["x" * 999, "word " * 200, "\n" * 999, "a\n\n" * 300])
def test_any_document_is_cut(text, monkeypatch):
    monkeypatch.setattr(documents, "CHARACTERS", 100)
    parts = [part for each in documents.document_parts([text]) for _, part in each]
    assert "".join(parts) == text and max(map(len, parts)) <= 100


def test_split():
    first, last = TokenBlocks(torch.arange(20).view(5, 4)).split(2)
    assert first.tokens[:, 0].tolist() == [0, 4, 8] and last.tokens[:, 0].tolist() == [12, 16]
    with pytest.raises(ValueError, match="5 of 5 blocks"):
        TokenBlocks(torch.arange(20).view(5, 4)).split(5)


def test_read_texts(tmp_path):
    (tmp_path / "b.txt").write_text("two\nlines")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n')
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    assert list(read_texts([tmp_path / "b.txt"])) == ["two\nlines"]
    assert list(read_texts([str(tmp_path)])) == ["two\nlines", "first", "second"]
    with pytest.raises(ValueError, match="does not exist"):
        list(read_texts(["./nothing.txt"]))
    with pytest.raises(ValueError, match="not UTF-8"):
        list(read_texts([tmp_path / "c.bin"]))
    (tmp_path / "deep" / "a.jsonl").write_text("{]")
    with pytest.raises(ValueError, match="line 1 is no JSON object"):
        list(read_texts([tmp_path / "deep"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no text files"):
        list(read_texts([tmp_path / "empty"]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": null}', "line 1 has None in column 'text'"),
        ("[1, 2]", r"no JSON object, but \[1, 2\]"),
        ('"a"', "but 'a'"),
    ],
)
def test_rows_without_text_are_refused(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(ValueError, match=f"a.jsonl, line 1 .*{message.removeprefix('line 1 ')}"):
        list(read_texts([tmp_path / "a.jsonl"]))


def test_a_dataset_of_the_hub_library(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    assert torch.equal(text_blocks(rows, tokenizer, 8).tokens, text_blocks(TEXTS, tokenizer, 8).tokens)
    streamed = rows.to_iterable_dataset()
    assert torch.equal(text_blocks(streamed, tokenizer, 8).tokens, text_blocks(TEXTS, tokenizer, 8).tokens)


def test_the_teacher_writes_its_own_text(tmp_path, stories, tokenizer):
    teacher = load(stories).train()
    first = sample_blocks(teacher, tokenizer, 5, 24, batch_size=2, cache=tmp_path, progress=False)
    assert first.tokens.shape == (5, 24) and set(first.tokens[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert teacher.training and len({tuple(row) for row in first.tokens.tolist()}) == 5
    # Its own text is far likelier to it than other tokens are.
    tokens = first.tokens.long()
    with torch.no_grad():
        own = teacher.eval()(input_ids=tokens, labels=tokens).loss
        other = teacher(input_ids=tokens.roll(1, 0)[:, torch.randperm(24)], labels=tokens).loss
    assert own < 2.5 < other
    again = sample_blocks(teacher, tokenizer, 5, 24, batch_size=2, progress=False)
    assert torch.equal(first.tokens, again.tokens)
    other = sample_blocks(teacher, tokenizer, 5, 24, batch_size=2, seed=1, progress=False)
    assert not torch.equal(first.tokens, other.tokens)


def test_the_cache_is_of_this_teacher(tmp_path, stories, tokenizer, monkeypatch):
    teacher = load(stories)
    first = sample_blocks(teacher, tokenizer, 2, 6, cache=tmp_path, progress=False)
    monkeypatch.setattr("hf_littlebit.train.data._sample", lambda *args: pytest.fail("sampled again"))
    assert torch.equal(sample_blocks(teacher, tokenizer, 2, 6, cache=tmp_path, progress=False).tokens, first.tokens)
    with torch.no_grad():
        teacher.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(pytest.fail.Exception, match="sampled again"):
        sample_blocks(teacher, tokenizer, 2, 6, cache=tmp_path, progress=False)
    with pytest.raises(ValueError, match="rows 0"):
        sample_blocks(teacher, tokenizer, 0, 6)


def test_what_was_written_before_a_kill_is_kept(tmp_path, stories, tokenizer, monkeypatch):
    teacher, options = load(stories), {"batch_size": 2, "progress": False}
    whole = sample_blocks(teacher, tokenizer, 5, 8, **options).tokens
    sampled = []

    def third_fails(*args):
        if len(sampled) == 2:
            raise KeyboardInterrupt
        sampled.append(args)
        return _sample(*args)

    with monkeypatch.context() as patch:
        patch.setattr("hf_littlebit.train.data._sample", third_fails)
        with pytest.raises(KeyboardInterrupt):
            sample_blocks(teacher, tokenizer, 5, 8, cache=tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr("hf_littlebit.train.data._sample", lambda *args: sampled.append(args) or _sample(*args))
    assert torch.equal(sample_blocks(teacher, tokenizer, 5, 8, cache=tmp_path, **options).tokens, whole)
    assert len(sampled) == 3 and len(list(tmp_path.iterdir())) == 1  # the parts have gone


def test_the_temperature_changes_the_text(stories, tokenizer):
    cold = sample_blocks(load(stories), tokenizer, 4, 16, temperature=1e-4, progress=False).tokens
    assert len({tuple(row) for row in cold.tolist()}) == 1  # the likeliest text, in every row


def test_tokens_are_drawn_as_likely_as_they_are():
    chances = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.25, 0.0, 0.125, 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn = _draw(chances.expand(80_000, -1), generator)
    assert drawn.shape == (80_000, 1) and drawn.dtype is torch.int64
    found = drawn.flatten().bincount(minlength=8) / 80_000
    assert torch.equal(found == 0, chances == 0)
    # Five standard deviations of the likeliest one's count.
    assert (found - chances).abs().max() < 5 * (0.25 / 80_000) ** 0.5


def test_a_row_of_its_own_is_drawn_from(monkeypatch):
    """Rows are independent, and the ends of the numbers that are drawn stay within the vocabulary."""
    chances = torch.eye(5)[[4, 0, 2]] * 3  # sums of another size than 1 are meant as they are
    for number in (0.0, 0.5, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda *size, generator, number=number: torch.full(size, number))
        assert _draw(chances, torch.Generator()).tolist() == [[4], [0], [2]]


def test_blocks_start_with_every_token_that_text_may_follow(stories, tokenizer):
    """A chat model's start token is that of a turn; what stood between documents may be its padding."""

    def starts(rows, behind=None, **named):
        """First tokens of so many blocks, for a tokenizer that puts nothing in front and has these special tokens."""
        chat = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), **named)
        chat.backend_tokenizer.post_processor = behind
        return sample_blocks(teacher, chat, rows, 4, batch_size=2, progress=False).tokens[:, 0].tolist()

    teacher = load(stories)
    assert starts(5, bos_token="<s>", eos_token="</s>", pad_token="<s>", unk_token="<unk>") == [1, 2, 0, 1, 2]
    assert starts(3, bos_token="<s>") == [1, 1, 1]
    assert starts(3, bos_token="<s>", pad_token="<new>") == [1, 1, 1]  # which the teacher has no embedding of
    assert len(set(starts(8))) > 4
    ends = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert starts(4, ends, bos_token="<s>", eos_token="</s>") == [1, 2, 1, 2]


def test_a_teacher_that_overflows_writes_nothing(stories, tokenizer):
    teacher = load(stories)
    teacher.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite"):
        sample_blocks(teacher, tokenizer, 2, 8, progress=False)

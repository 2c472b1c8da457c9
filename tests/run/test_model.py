"""Loading models: the random one, saved ones, and the packaged one where the cache has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mbf.run.model import SMOLLM2, TINY, load_model

TEXT = (
    "The Prime Minister said on Tuesday that the government would spend more money on schools and hospitals next "
    "year, after a long debate in parliament about taxes."
)


def test_the_random_one_is_the_same_every_time_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    model, tokenizer = load_model(TINY)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    again, _ = load_model(TINY)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    logits = model(ids).logits
    assert torch.equal(logits, again(ids).logits)
    assert logits.std() > 0.01
    assert not model.training


def test_the_random_one_takes_any_text() -> None:
    _, tokenizer = load_model(TINY)
    text = "naïve 漢字 \n\t€ <x>"
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())
    assert tokenizer(["a", "abc"], padding=True)["attention_mask"] == [[1, 0, 0], [1, 1, 1]]


def test_dtype_is_as_asked() -> None:
    model, _ = load_model(TINY, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_saved_model_loads_with_a_padding_token(tmp_path: Path) -> None:
    model, tokenizer = load_model(TINY)
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load_model(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded_tokenizer.pad_token == "</s>"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"'smollm2' was not found.*{SMOLLM2}, {TINY}"):
        load_model("smollm2")


@pytest.mark.model
def test_the_packaged_one_knows_english() -> None:
    model, tokenizer = load_model(SMOLLM2)
    assert model.config.num_hidden_layers == 30
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|im_end|>", "<|im_end|>")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert ids[0, 0] != tokenizer.bos_token_id
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        sense, nonsense = (model(tokens, labels=tokens).loss.exp().item() for tokens in (ids, shuffled))
    assert sense < 40 < 400 < nonsense

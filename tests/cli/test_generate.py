"""Generation: greedy, drawn, in batches, and the verb; and what it refuses."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import v4jax as package
from v4jax.errors import UserError
from v4jax.serve import generate as verb
from v4jax.serve.decoder import MAX_STEPS, Decoder, Drawing
from v4jax.serve.sampling import Sampling, sequence_keys
from v4jax.tokenizer import Tokenizer

NEW = 12
TOTAL = 34
"""Tokens that the longest sequence of a batch may have: one size of cache, so that steps are compiled once."""
GREEDY = Sampling(temperature=0)
# Their lengths lie on both sides of the sliding window (12) and of the chunks in which prompts are read (16).
PROMPTS = [[5], [9, 8, 7], list(range(20, TOTAL - NEW + 20))]


@pytest.fixture(scope="module")
def decoder(model_directory: Path) -> Decoder:
    return Decoder(package.load(model_directory, dtype="float32"), chunk=16)


def complete(
    decoder: Decoder, prompts: Sequence[Sequence[int]], *, sampling: Sampling = GREEDY, stop: Sequence[int] = ()
) -> list[list[int | None]]:
    """The first new tokens of each sequence."""
    room = TOTAL - max(map(len, prompts))
    steps = verb.generate(decoder, prompts, max_new_tokens=room, sampling=sampling, stop=stop)
    return [list(sequence[:NEW]) for sequence in zip(*steps, strict=True)]


@pytest.fixture(scope="module")
def greedy(decoder: Decoder) -> list[list[int | None]]:
    """The likeliest continuations of the prompts, as one batch."""
    return complete(decoder, PROMPTS)


# ---- the core --------------------------------------------------------------------------------------------------------
def test_greedy_tokens_are_the_likeliest_of_the_whole_forward_pass(decoder, greedy):
    for prompt, new in zip(PROMPTS, greedy, strict=True):
        logits = np.asarray(decoder.model(np.array([[*prompt, *new]])))[0]
        np.testing.assert_array_equal(logits[len(prompt) - 1 : -1].argmax(-1), new)


def test_sequences_of_a_batch_do_not_know_of_each_other(decoder, greedy):
    for prompt, want in zip(PROMPTS, greedy, strict=True):
        assert complete(decoder, [prompt]) == [want]


def test_a_draw_depends_on_its_place_and_seed_alone(decoder):
    drawn = complete(decoder, PROMPTS, sampling=Sampling(seed=3))
    assert complete(decoder, PROMPTS, sampling=Sampling(seed=3)) == drawn
    assert complete(decoder, PROMPTS[:1], sampling=Sampling(seed=3)) == drawn[:1]
    assert complete(decoder, PROMPTS, sampling=Sampling(seed=4)) != drawn


def test_equal_prompts_of_a_batch_are_continued_differently(decoder):
    first, second, _ = complete(decoder, [[5], [5], PROMPTS[2]], sampling=Sampling(seed=0))
    assert first != second


def test_a_tiny_nucleus_is_greedy(decoder, greedy):
    assert complete(decoder, PROMPTS, sampling=Sampling(top_p=1e-6)) == greedy


def test_a_stopped_sequence_ends_with_its_stop_token_while_others_go_on(decoder, greedy):
    stop = greedy[0][3]
    got = complete(decoder, PROMPTS, stop=[stop])
    for tokens, free in zip(got, greedy, strict=True):
        end = free.index(stop) + 1 if stop in free else NEW
        assert tokens == free[:end] + [None] * (len(tokens) - end)
    assert None in got[0]


def test_generation_ends_when_all_sequences_have(decoder, greedy):
    (tokens,) = complete(decoder, PROMPTS[:1], stop=[greedy[0][3]])
    assert len(tokens) == greedy[0].index(greedy[0][3]) + 1


@pytest.mark.parametrize("steps", [1, 5, MAX_STEPS])
def test_tokens_do_not_depend_on_how_many_steps_a_call_takes(decoder, greedy, monkeypatch, steps):
    stop = greedy[1][6]
    want = complete(decoder, PROMPTS, stop=[stop])
    monkeypatch.setattr(verb, "_steps_per_call", lambda _: steps)
    assert complete(decoder, PROMPTS) == greedy
    assert complete(decoder, PROMPTS, stop=[stop]) == want


def test_a_call_ends_when_all_sequences_have(decoder, greedy):
    prompt, (first, *rest) = PROMPTS[0], greedy[0]
    taken = rest.index(rest[3]) + 1
    _, cache = decoder.prefill([prompt], TOTAL)
    drawing = Drawing(sequence_keys(0, 1), 0.0, 1.0, np.array([rest[3]], np.int32))
    tokens, is_open = np.array([first], np.int32), np.ones(1, bool)
    drawn, cache = decoder.decode(tokens, is_open, cache, drawing, 9)
    np.testing.assert_array_equal(drawn[:, 0], [*rest[:taken], *[0] * (MAX_STEPS - taken)])
    np.testing.assert_array_equal(cache.length, len(prompt) + taken)
    drawn, cache = decoder.decode(tokens, ~is_open, cache, drawing, 9)
    assert not np.any(drawn)


def test_a_call_takes_about_a_fifth_of_a_second():
    assert [verb._steps_per_call(seconds) for seconds in (None, 5.0, 0.19, 0.05, 1e-9)] == [1, 1, 1, 4, MAX_STEPS]


@pytest.mark.parametrize("count", [0, MAX_STEPS + 1])
def test_a_call_of_too_many_steps_or_none_is_refused(decoder, count):
    cache, drawing = decoder.model.init_cache(1, TOTAL), Drawing(sequence_keys(0, 1), 0.0, 1.0, np.zeros(0, np.int32))
    with pytest.raises(ValueError, match=f"count: got {count}, need 1 to {MAX_STEPS}"):
        decoder.decode(np.zeros(1, np.int32), np.ones(1, bool), cache, drawing, count)


def test_stop_tokens_that_no_model_knows_stop_nothing(decoder, greedy):
    assert complete(decoder, PROMPTS, stop=[-1, 300, 2**40]) == greedy


def test_the_end_tokens_of_the_config_stop_by_default(decoder, greedy, monkeypatch):
    end = greedy[0][2]
    monkeypatch.setattr(type(decoder.model.config), "eos_token_ids", (end,))
    room = TOTAL - len(PROMPTS[0])
    steps = list(verb.generate(decoder, PROMPTS[:1], max_new_tokens=room, sampling=GREEDY))
    assert steps[-1] == [end]
    assert len(steps) == greedy[0].index(end) + 1


def test_a_sequence_may_fill_the_context_to_its_last_token(decoder):
    context = decoder.model.config.max_position_embeddings
    steps = verb.generate(decoder, [[7] * (context - 2)], max_new_tokens=2, sampling=GREEDY, stop=())
    assert [len(step) for step in steps] == [1, 1]


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], 1, "prompts: got none"),
        ([[1], []], 1, "prompt 1 is empty"),
        ([[1, 300]], 1, "prompt 0: token id 300, need 0 to 299"),
        ([[-1]], 1, "prompt 0: token id -1"),
        ([[1] * 60, [1]], 5, "the prompt has 60 tokens and the sequence may have 65; the model's context is 64"),
        ([[1]], 0, "max_new_tokens: got 0"),
    ],
    ids=["no prompt", "empty prompt", "beyond the vocabulary", "negative", "beyond the context", "nothing to do"],
)
def test_unusable_prompts_are_refused_before_the_first_step(decoder, prompts, new, message):
    with pytest.raises(UserError) as caught:
        next(verb.generate(decoder, prompts, max_new_tokens=new))
    assert message in str(caught.value)


# ---- the verb --------------------------------------------------------------------------------------------------------
@pytest.fixture
def generate(v4jax: Callable, model_directory: Path) -> Callable[..., str]:
    """Runs the verb and returns its text."""

    def run(*arguments: object) -> str:
        result = v4jax("generate", model_directory, "--max-new-tokens", NEW, *arguments)
        assert result.code == 0, result.err
        return result.out

    return run


def test_the_verb_writes_the_text_of_the_core(generate, decoder, model_directory):
    tokenizer = Tokenizer.from_directory(model_directory)
    prompt = tokenizer.encode("def add", add_bos=True)
    steps = verb.generate(decoder, [prompt], max_new_tokens=NEW, sampling=GREEDY, stop=tokenizer.eos_token_ids)
    want = [token for (token,) in steps]
    text = generate("--prompt", "def add", "--temperature", "0")
    assert text.removesuffix("\n") == tokenizer.decode(
        [token for token in want if token is not None], skip_special_tokens=True
    )
    assert generate("--prompt", "def add", "--temperature", "0") == text


def test_the_verb_stops_at_the_end_tokens_of_the_generation_config(v4jax, model_directory, decoder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    tokenizer = Tokenizer.from_directory(model)
    prompt = tokenizer.encode("def add", add_bos=True)
    ((first, second),) = [one[:2] for one in complete(decoder, [prompt])]
    assert first != second
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, second]}))
    result = v4jax("generate", model, "--prompt", "def add", "--temperature", "0", "--max-new-tokens", NEW)
    assert result.out == tokenizer.decode([first, second], skip_special_tokens=True) + "\n"


def test_the_same_seed_gives_the_same_text(generate):
    one = generate("--prompt", "def add", "--seed", "1")
    assert generate("--prompt", "def add", "--seed", "1") == one
    assert generate("--prompt", "def add", "--seed", "2") != one


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (["--system", "Be brief.", "--thinking"], {"thinking": True}),
    ],
    ids=["plain", "system text and thinking"],
)
def test_chat_renders_a_conversation(v4jax, model_directory, monkeypatch, arguments, options):
    seen = []

    def record(model: object, prompts: list[list[int]], **settings: object) -> list[list[int]]:
        seen.extend(prompts)
        return []

    monkeypatch.setattr(verb, "generate", record)
    assert v4jax("generate", model_directory, "--prompt", "Hello", "--chat", *arguments).code == 0
    messages = [{"role": "user", "content": "Hello"}]
    if arguments:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    assert seen == [Tokenizer.from_directory(model_directory).encode_chat(messages, **options)]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompt", ""], 1, "--prompt is empty"),
        (["--prompt", "a", "--max-new-tokens", "64"], 1, "the model's context is 64 tokens"),
        (["--prompt", "a", "--max-new-tokens", "0"], 1, "max_new_tokens: got 0, need at least 1"),
        (["--prompt", "a", "--temperature", "-1"], 1, "temperature: got -1.0"),
        (["--prompt", "a", "--temperature", "nan"], 1, "temperature: got nan"),
        (["--prompt", "a", "--top-p", "0"], 1, "top_p: got 0.0"),
        (["--prompt", "a", "--seed", "-1"], 1, "seed: got -1"),
        (["--prompt", "a", "--seed", str(2**32)], 1, f"seed: got {2**32}, need 0 or more, below 2^32"),
        (["--prompt", "a\udcff"], 1, "the text has '\\udcff' at character 1, need Unicode"),
        (["--prompt", "a", "--thinking"], 2, "add --chat"),
        (["--prompt", "a", "--system", "b"], 2, "add --chat"),
        (["--prompt", "a", "--beams", "2"], 2, "--beams"),
        (["--prompt", "a", "--implementation", "no=xla", "--implementation", "index_topk=xla"], 2, "no=xla"),
        (["--prompt", "--debug"], 2, "Missing value for argument '--prompt'"),
        ([], 2, "--prompt"),
    ],
)
def test_bad_flags(v4jax, model_directory, arguments, code, message):
    result = v4jax("generate", model_directory, *arguments)
    assert result.code == code
    assert message in result.err
    assert result.out == ""
    assert "Traceback" not in result.err


def test_a_prompt_may_look_like_a_flag(generate):
    assert generate("--prompt=--debug")


@pytest.mark.filterwarnings("error:overflow:RuntimeWarning")
@pytest.mark.parametrize("temperature", ["1e39", "inf"])
def test_a_temperature_beyond_float32_is_the_highest(v4jax, model_directory, temperature):
    arguments = ["generate", model_directory, "--prompt", "def", "--max-new-tokens", NEW, "--temperature"]
    result, highest = v4jax(*arguments, temperature), v4jax(*arguments, "3e38")
    assert (result.code, result.message) == (0, "")
    assert result.out == highest.out


def test_a_file_in_place_of_the_model_directory(v4jax, model_directory):
    result = v4jax("generate", model_directory / "model.safetensors", "--prompt", "a")
    assert result.code == 1
    assert f"got a file, need a model directory; give {model_directory}" in result.message


def test_a_tokenizer_with_more_ids_than_the_model(v4jax, model_directory, tmp_path):
    for file in model_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer.from_directory(tmp_path)
    tokenizer.backend.add_tokens([f"<{n}>" for n in range(100)])
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    result = v4jax("generate", tmp_path, "--prompt", "<99>")
    assert result.code == 1
    assert "need 0 to 299; use the model's own tokenizer" in result.message

"""Text written by a cut model against ``generate`` of the uncut one with PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from pplr.backbones.adapters import AdapterState
from pplr.backbones.causal_lm import CausalLM
from pplr.config import AdapterConfig, TrainingConfig
from pplr.recommend.generation import generate
from pplr.recommend.trie import TitleTrie, TrieConstraint
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import every_cut, peft_model, random_adapter, tiny_backbone

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": True},
}
ADAPTER = AdapterConfig(rank=4)
CUTS = every_cut(4)
CUT_NAMES = [f"k{plan.input_layers}-m{plan.output_layers}" for plan in CUTS]
TITLES = [list(word.encode()) for word in ("oak", "oat", "elm", "elder", "yew", "fir")]
NEW = 6


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Writer:
    """The uncut model by transformers and PEFT, and what it was asked before."""

    backbone: CausalLM
    state: AdapterState
    whole: PeftModel
    prompts: list[list[int]]

    def write(self, *, beams: int, trie: bool = False, stop: tuple[int, ...] = (), returned: int = 1) -> Any:
        longest = max(map(len, self.prompts))
        rows = [[257] * (longest - len(prompt)) + prompt for prompt in self.prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in self.prompts]
        with torch.no_grad():
            return self.whole.generate(
                input_ids=torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                generation_config=GenerationConfig(
                    max_new_tokens=NEW,
                    num_beams=beams,
                    num_return_sequences=returned,
                    do_sample=False,
                    length_penalty=0.0 if trie else 1.0,
                    eos_token_id=[256, *stop],
                    pad_token_id=256,
                    return_dict_in_generate=True,
                    output_scores=True,
                ),
                logits_processor=LogitsProcessorList(self.constraint(beams) if trie else []),
            )

    def constraint(self, beams: int) -> list[TrieConstraint]:
        return [TrieConstraint(TitleTrie(TITLES, 256), max(map(len, self.prompts)), beams)]

    def client(self, plan: CutPlan) -> ClientModel:
        return CutModel(self.backbone, plan, ADAPTER, TrainingConfig()).client("one", self.state)


def _drawn(*lengths: int) -> list[list[int]]:
    source = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (length,), generator=source).tolist() for length in lengths]


@pytest.fixture(scope="module", params=FAMILIES)
def writer(request: pytest.FixtureRequest) -> Writer:
    backbone = tiny_backbone(request.param, **FAMILIES[request.param])
    shapes = CutModel(backbone, CUTS[-1], ADAPTER, TrainingConfig()).shapes
    state = random_adapter(shapes)
    return Writer(backbone, state, peft_model(backbone, ADAPTER, state), _drawn(13, 5, 10))


@pytest.fixture(scope="module")
def llama() -> Writer:
    backbone = tiny_backbone()
    state = random_adapter(CutModel(backbone, CUTS[-1], ADAPTER, TrainingConfig()).shapes)
    return Writer(backbone, state, peft_model(backbone, ADAPTER, state), _drawn(9, 4))


def _same_tokens(one: Tensor, other: Tensor) -> bool:
    """Compare rows that may have been padded to different lengths by end tokens."""
    longest = max(one.shape[1], other.shape[1])
    padded = [torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=256) for t in (one, other)]
    return torch.equal(*padded)


@pytest.fixture(scope="module")
def written(writer: Writer) -> dict[str, Any]:
    return {
        "greedy": writer.write(beams=1),
        "beams": writer.write(beams=3),
        "trie": writer.write(beams=3, trie=True, returned=2),
    }


@pytest.mark.parametrize("plan", CUTS, ids=CUT_NAMES)
def test_every_cut_writes_what_the_uncut_model_writes(writer: Writer, written: dict[str, Any], plan: CutPlan):
    model = writer.client(plan)
    greedy = generate(model, writer.prompts, max_new_tokens=NEW)
    assert _same_tokens(greedy.sequences, written["greedy"].sequences)
    assert greedy.scores is None
    beams = generate(model, writer.prompts, beams=3, max_new_tokens=NEW)
    assert _same_tokens(beams.sequences, written["beams"].sequences)
    trie = generate(
        model,
        writer.prompts,
        beams=3,
        max_new_tokens=NEW,
        returned=2,
        length_penalty=0.0,
        processors=writer.constraint(3),
    )
    assert _same_tokens(trie.sequences, written["trie"].sequences)
    torch.testing.assert_close(trie.scores, written["trie"].sequences_scores, rtol=1e-4, atol=1e-4)
    assert trie.prompt_length == beams.prompt_length == 13


def test_what_is_compared_is_not_all_one_answer(written: dict[str, Any]):
    answers = [tuple(row[13:].tolist()) for row in (*written["greedy"].sequences, *written["beams"].sequences)]
    assert len(set(answers)) >= 4
    words = {bytes(token for token in row[13:].tolist() if token != 256).decode() for row in written["trie"].sequences}
    assert words <= {"oak", "oat", "elm", "elder", "yew", "fir"}
    assert len(words) >= 2


def test_all_returned_beams_come_with_their_scores(llama: Writer):
    expected = llama.write(beams=4, returned=4)
    own = generate(llama.client(CutPlan(1, 1, 4)), llama.prompts, beams=4, max_new_tokens=NEW, returned=4)
    assert _same_tokens(own.sequences, expected.sequences)
    torch.testing.assert_close(own.scores, expected.sequences_scores, rtol=1e-4, atol=1e-5)
    assert own.scores.shape == (8,)
    for user in range(2):
        assert own.scores[4 * user : 4 * user + 4].diff().max() <= 0


@pytest.mark.parametrize("beams", [1, 3])
def test_an_answer_ends_at_a_stop_token(llama: Writer, beams: int):
    model = llama.client(CutPlan(1, 1, 4))
    free = generate(model, llama.prompts, beams=beams, max_new_tokens=NEW).sequences[0, 9:].tolist()
    stop = free[0]
    stopped = generate(model, llama.prompts, beams=beams, max_new_tokens=NEW, stop_tokens=[stop])
    assert _same_tokens(stopped.sequences, llama.write(beams=beams, stop=(stop,)).sequences)
    if beams == 1:
        assert set(stopped.sequences[0, 10:].tolist()) <= {256}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_prompt_alone_is_written_on_as_among_others(llama: Writer, beams: int, length: int):
    prompts = _drawn(length, 14, 6)
    model = llama.client(CutPlan(1, 1, 4))
    together = generate(model, prompts, beams=beams, max_new_tokens=NEW)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], beams=beams, max_new_tokens=NEW)
        assert _same_tokens(alone.sequences[:, len(prompt) :], together.sequences[row : row + 1, 14:])


@pytest.mark.parametrize("k", [0, 2])
def test_bytes_are_those_of_real_tokens(llama: Writer, k: int):
    """Prompts cross once, whatever the beams, and each new token of each beam once but the last; padding never."""
    state = 32 * 4
    for beams in (1, 3):
        model = llama.client(CutPlan(k, 1, 4))
        generate(model, llama.prompts, beams=beams, max_new_tokens=NEW, processors=[_Never(256)])
        prompts = sum(len(prompt) for prompt in llama.prompts)
        crossed = (prompts + 2 * beams * (NEW - 1)) * state
        assert (model.traffic.bytes_up, model.traffic.bytes_down) == (crossed, crossed)


@pytest.fixture(scope="module", params=FAMILIES)
def alike(request: pytest.FixtureRequest) -> Writer:
    """Prompts that begin with the same seven tokens, the last one with nothing but these and one more."""
    backbone = tiny_backbone(request.param, **FAMILIES[request.param])
    state = random_adapter(CutModel(backbone, CUTS[-1], ADAPTER, TrainingConfig()).shapes)
    start, *rest = _drawn(7, 6, 2, 9, 1)
    prompts = [start + own for own in rest]
    return Writer(backbone, state, peft_model(backbone, ADAPTER, state), prompts)


@pytest.mark.parametrize("plan", [CutPlan(0, 0, 4), CutPlan(1, 1, 4), CUTS[-1]], ids=["k0-m0", "k1-m1", "uncut"])
def test_what_prompts_begin_with_alike_is_run_once(alike: Writer, plan: CutPlan):
    expected = alike.write(beams=3, returned=3)
    model = alike.client(plan)
    own = generate(model, alike.prompts, beams=3, max_new_tokens=NEW, returned=3)
    assert _same_tokens(own.sequences, expected.sequences)
    torch.testing.assert_close(own.scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
    if model.transport is not None and alike.backbone.takes_masks:
        before = model.traffic.bytes_up
        generate(model, alike.prompts, max_new_tokens=1)
        assert model.traffic.bytes_up - before == (7 + 6 + 2 + 9 + 1) * 32 * 4


def test_only_families_that_look_back_a_limited_way_have_a_row_for_each_beam():
    packed = {family: tiny_backbone(family, **options).takes_masks for family, options in FAMILIES.items()}
    assert packed == {"llama": True, "mistral": False, "qwen2": False, "qwen3": True}


class _Ending:
    """Has user u end after u tokens, and hears who goes on."""

    def __init__(self, users: int, beams: int, length: int) -> None:
        self.users, self.beams, self.length = list(range(users)), beams, length
        self.rows: list[int] = []

    def keep(self, users: Tensor) -> None:
        self.users = [self.users[user] for user in users.tolist()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.rows.append(len(input_ids))
        scores, each = scores.clone(), len(input_ids) // len(self.users)
        for row in range(len(input_ids)):
            ends = input_ids.shape[1] - self.length >= self.users[row // each]
            scores[row] = torch.full_like(scores[row], -torch.inf) if ends else scores[row]
            scores[row, 256] = 0.0 if ends else -torch.inf
        return scores


@pytest.mark.parametrize("beams", [1, 2])
def test_whoever_is_done_leaves_the_batch(llama: Writer, beams: int):
    prompts = _drawn(8, 3, 12, 5)
    model = llama.client(CutPlan(1, 1, 4))
    ending = _Ending(4, beams, 12)
    together = generate(model, prompts, beams=beams, max_new_tokens=NEW, processors=[ending])
    for user, prompt in enumerate(prompts):
        one = _Ending(1, beams, len(prompt))
        one.users = [user]
        alone = generate(model, [prompt], beams=beams, max_new_tokens=NEW, processors=[one])
        assert _same_tokens(alone.sequences[:, len(prompt) :], together.sequences[user : user + 1, 12:])
        assert together.sequences[user, 12:].tolist().index(256) == user
    assert ending.rows == [4, *(beams * users for users in (3, 2, 1))]


class _Never:
    """Forbids a token, so that answers have their full length."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.token] = -torch.inf
        return scores


class _Failing:
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_caches_are_closed_whatever_happens(llama: Writer):
    cut = CutModel(llama.backbone, CutPlan(1, 1, 4), ADAPTER, TrainingConfig())
    model = cut.client("one", llama.state)
    expected = generate(model, llama.prompts, max_new_tokens=NEW)
    assert not cut.host._of("one").caches
    with pytest.raises(KeyboardInterrupt):
        generate(model, llama.prompts, beams=2, max_new_tokens=NEW, processors=[_Failing()])
    assert not cut.host._of("one").caches
    assert torch.equal(generate(model, llama.prompts, max_new_tokens=NEW).sequences, expected.sequences)


def test_writing_leaves_training_alone(llama: Writer):
    """A validation between a forward and a backward pass changes no gradient."""
    batch = llama.backbone.pad(_drawn(9, 6), [4, 2])
    gradients = []
    for writes in (False, True):
        cut = CutModel(llama.backbone, CutPlan(1, 1, 4), AdapterConfig(rank=4, dropout=0.3), TrainingConfig())
        model = cut.client("one", llama.state)
        model.begin_round(2)
        loss = model.train_loss(batch, 1)
        if writes:
            generate(model, llama.prompts, beams=2, max_new_tokens=NEW)
        loss.backward()
        gradients.append(model.optimizer_step(None))
    assert gradients[0] == gradients[1]

"""Every planted fault is named, and no other; sound set-ups of many shapes raise no alarm; also in models without our code."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import groundup.diagnostics as diagnostics
from groundup.diagnostics.check import failed
from groundup.diagnostics.examination import culprits, examine
from tests.planted import FAULTS, HEALTHY, DetachedMLPBlock, residual_detached, sound, tokens

SLOW = (
    "initial_weights_zero",
    "model_too_simple",
    "eight layers",
    "wide",
    "padded vocabulary",
    "xavier, exact gelu",
    "post norm",
)


def some_slow(names: Any) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.mark.parametrize("fault", some_slow(FAULTS))
def test_a_planted_fault_is_named_and_no_other(fault):
    checks = list(examine(FAULTS[fault]()))
    assert culprits(checks) == [fault], [(check.name, check.measured) for check in failed(checks)]
    # What fails without a name would be a false alarm too.
    assert all(check.culprit and check.advice for check in failed(checks))


@pytest.mark.parametrize("name", some_slow(HEALTHY))
def test_a_sound_set_up_raises_no_alarm(name):
    checks = list(examine(sound(**HEALTHY[name])))
    assert not failed(checks), [(check.name, check.measured) for check in failed(checks)]
    unmeasured = [check.name for check in checks if check.passed is None]
    assert unmeasured == ([] if HEALTHY[name].get("n_layer") != 1 else ["gradient_depth"])


def test_the_second_sum_may_be_the_one_that_is_cut():
    checks = list(examine(residual_detached(DetachedMLPBlock), only=["gradients"]))
    assert culprits(checks) == ["residual_detached"]
    assert "h.0, h.1" in failed(checks)[0].advice


def test_what_failed_to_be_learned_names_the_evidence_of_all_five():
    checks = {check.name: check for check in examine(FAULTS["learning_rate_too_large"](), only=["learning"])}
    suspects = checks["overfit"].details["suspects"]
    assert [s["name"] for s in suspects] == ["loss", "backward", "hyper-parameters", "model"]
    assert [s["guilty"] for s in suspects] == [False, False, True, False]
    assert "hyper-parameters" in checks["overfit"].advice


# Two models as people write them, without a line of groundup.


class Lecture(nn.Module):
    """A small GPT as in a lecture: heads that are modules of their own, ReLU, PyTorch's initial weights."""

    def __init__(self, vocab: int = 64, width: int = 32, heads: int = 4, layers: int = 2, length: int = 32, shift: int = 0):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(LectureBlock(width, heads, length, shift) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.tokens(ids) + self.places(torch.arange(ids.size(1)))
        scores = self.head(self.norm(self.blocks(x)))
        return scores, None if targets is None else F.cross_entropy(scores.flatten(0, 1), targets.flatten())


class LectureBlock(nn.Module):
    def __init__(self, width: int, heads: int, length: int, shift: int):
        super().__init__()
        self.heads = nn.ModuleList(LectureHead(width, width // heads, length, shift) for _ in range(heads))
        self.mix, self.one, self.two = nn.Linear(width, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.Dropout(0.1))
        self.cut = False

    def forward(self, x: Tensor) -> Tensor:
        read = self.one(x)
        x = (x.detach() if self.cut else x) + self.mix(torch.cat([head(read) for head in self.heads], -1))
        return x + self.feed(self.two(x))


class LectureHead(nn.Module):
    def __init__(self, width: int, size: int, length: int, shift: int):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, size, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(length, length), shift))

    def forward(self, x: Tensor) -> Tensor:
        T = x.size(1)
        weights = self.query(x) @ self.key(x).transpose(1, 2) * self.key.out_features**-0.5
        weights = weights.masked_fill(self.tril[:T, :T] == 0, float("-inf")).softmax(-1)
        return weights @ self.value(x)


class Encoder(nn.Module):
    """PyTorch's own blocks, made causal by their mask; tied, as GPT-2, with embeddings small enough for it."""

    def __init__(self, vocab: int = 80, width: int = 48, causal: bool = True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True, activation="gelu"
        )
        self.embed, self.place = nn.Embedding(vocab, width), nn.Parameter(0.02 * torch.randn(64, width))
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, vocab, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.out.weight = self.embed.weight
        self.causal = causal

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        T = ids.size(1)
        mask = nn.Transformer.generate_square_subsequent_mask(T) if self.causal else None
        return {"logits": self.out(self.encoder(self.embed(ids) + self.place[:T], mask=mask))}


def seeded(kind: type[nn.Module], **how: Any) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return kind(**how)


def test_a_plain_pytorch_model_passes():
    model = seeded(Lecture)
    report = diagnostics.check(model, tokens(64, 4, 33, 5), optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert report.passed, str(report)


def test_pytorchs_own_blocks_pass_tied():
    model = seeded(Encoder)
    report = diagnostics.check(model, tokens(80, 4, 33, 6), nn.CrossEntropyLoss(), learning_rate=1e-3)
    assert report.passed, str(report)
    assert "embed.weight = out.weight" in str(report)


def test_a_mask_off_by_one_in_a_plain_model_is_named():
    report = diagnostics.check(seeded(Lecture, shift=1), tokens(64, 4, 33, 5), learning_rate=1e-3)
    assert report.culprits == ["causal_leak"], str(report)
    assert "off by one" in str(report)


def test_a_missing_mask_in_pytorchs_own_blocks_is_named():
    report = diagnostics.check(seeded(Encoder, causal=False), tokens(80, 4, 33, 6), learning_rate=1e-3)
    assert report.culprits == ["causal_leak"], str(report)


def test_a_cut_residual_stream_in_a_plain_model_is_named():
    model = seeded(Lecture)
    model.blocks[1].cut = True
    report = diagnostics.check(model, tokens(64, 4, 33, 5), learning_rate=1e-3)
    assert report.culprits == ["residual_detached"], str(report)
    assert "blocks.1" in str(report)


def test_a_batch_that_is_not_shifted_in_a_plain_model_is_named():
    ids = tokens(64, 4, 32, 5)
    assert diagnostics.check(seeded(Lecture), (ids, ids), learning_rate=1e-3).culprits == ["target_not_shifted"]


def test_a_loss_that_shifts_shifted_labels_is_named():
    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    assert diagnostics.check(seeded(Lecture), tokens(64, 4, 33, 5), loss, learning_rate=1e-3).culprits == [
        "target_shifted_twice"
    ]


def test_pytorchs_embeddings_as_a_tied_head_are_too_large():
    model = seeded(Encoder)
    nn.init.normal_(model.embed.weight)
    report = diagnostics.check(model, tokens(80, 4, 33, 6), learning_rate=1e-3)
    assert report.culprits == ["initial_weights_too_large"], str(report)

"""The fused decoder and attention over images and sound against transformers: whole multimodal models
run eagerly, uncached, and the same text model in steps on the vectors and positions it was given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux.kernels import rms_norm
from loramux.layers.batch import Overlay
from loramux.models.attach import Attached
from loramux.models.fuse import fuse
from loramux.models.layers import FusedDecoder
from parity.multimodal import FAMILIES, MediaOracle, random_audio, random_image, save_model
from parity.text_models import TextModel, attach_text, cache_of, random_text, run_step

M_ROPE = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen2.5-omni")
# PaliGemma attends to whole prompts in both directions, Phi-4 keeps its towers in its text model.
SERVED = [name for name in FAMILIES if name not in ("paligemma", "phi4-multimodal")]
TIGHT = {"atol": 2e-3, "rtol": 1e-3}  # of logits of about 10


@dataclass(frozen=True)
class Case:
    """A prompt with two items of each modality: what its model computes, and what its text model is
    given."""

    logits: torch.Tensor  # [T, V]
    attached: Attached
    ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T] or [3, T]
    rows: torch.Tensor  # [M] where media stand
    vectors: torch.Tensor  # [1 + L, M, D]

    def overlay(self, rows: range) -> Overlay:
        """Of the step of these rows."""
        here = (self.rows >= rows.start) & (self.rows < rows.stop)  # [M]
        return Overlay(self.rows[here] - rows.start, self.vectors[:, here])

    def images(self) -> list[range]:
        """Runs of rows of media."""
        cuts = [i for i in range(1, len(self.rows)) if self.rows[i] != self.rows[i - 1] + 1]
        parts = torch.tensor_split(self.rows, cuts)
        return [range(int(part[0]), int(part[-1]) + 1) for part in parts]

    def last_keys(self, rows: range) -> torch.Tensor:
        """[T] int32 of the step of these rows, in which images are whole."""
        last = torch.full((len(self.ids),), -1, dtype=torch.int32)  # [all]
        for image in self.images():
            last[image.start : image.stop] = image.stop - 1
        return last[rows.start : rows.stop]


def _make_case(name: str, folder: Path) -> Case:
    oracle = MediaOracle(save_model(folder, name))
    prompts = oracle.family.prompts
    text = "look: " + " then ".join([*prompts.values(), *prompts.values()]) + " so what is it?"
    media = {}
    if "image" in prompts:
        media["images"] = [random_image(1), random_image(2, 40, 64)]
    if "audio" in prompts:
        media["audio"] = [random_audio(3), random_audio(4, 0.4)]
    inputs = oracle.inputs(text, **media)
    given: dict[str, Any] = {}

    def see(module: Any, _: Any, kwargs: dict[str, Any]) -> None:
        given.update(kwargs)

    decoder = oracle.base.get_decoder()
    with decoder.register_forward_pre_hook(see, with_kwargs=True):
        logits = oracle.logits(inputs)  # [T, V]
    embeddings, ids = given["inputs_embeds"][0], inputs["input_ids"][0]  # [T, D], [T]
    words = oracle.base.get_input_embeddings()(ids)  # [T, D]
    rows = (embeddings != words).any(-1).nonzero().flatten()  # [M]
    deep = given.get("deepstack_visual_embeds") or []
    vectors = torch.stack([embeddings[rows], *deep])  # [1 + L, M, D]
    positions = given.get("position_ids")
    positions = torch.arange(len(ids)) if positions is None else positions[-3:, 0]  # [3, T]
    attached = attach_text(decoder, oracle.base.get_output_embeddings())
    return Case(logits, attached, ids, positions, rows, vectors.detach())


@pytest.fixture(scope="module", params=SERVED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return _make_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return _make_case("gemma3", tmp_path_factory.mktemp("gemma3"))


def _fused(attached: Attached, extra_rows: int = 0) -> FusedDecoder:
    decoder = fuse(attached, 256, extra_rows)
    assert decoder is not None
    return decoder


def _place(decoder: FusedDecoder, positions: torch.Tensor) -> torch.Tensor:
    """Positions [T] or [3, T] of a step as its runner gives them: [T]."""
    if positions.dim() == 1:
        return positions
    apart = (positions != positions[0]).any(0)  # [T]
    first = decoder.set_positions(positions[:, apart])
    placed = positions[0].clone()  # [T]
    placed[apart] = first + torch.arange(int(apart.sum()))
    return placed


def _run(case: Case, decoder: FusedDecoder, cuts: list[int], last_keys: bool) -> torch.Tensor:
    """Logits [T, V] in steps that end at `cuts` and at the end."""
    ends, parts = [*cuts, len(case.ids)], []
    with cache_of(case.attached, len(case.ids)) as table:
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            rows = range(start, end)
            positions = _place(decoder, case.positions[..., start:end])
            overlay = case.overlay(rows)
            parts.append(
                run_step(
                    *(case.attached, table, rows, positions),
                    case.last_keys(rows) if last_keys else None,
                    lambda ids=case.ids[start:end], overlay=overlay: decoder.forward(
                        ids, overlay=overlay if len(overlay.rows) else None
                    ),
                )
            )
    return torch.cat(parts)  # [T, V]


def test_a_prompt_with_media_in_steps(case: Case, request: pytest.FixtureRequest) -> None:
    """In one step; in two that cut through media, but between them for Gemma 3; and the end alone."""
    decoder = _fused(case.attached, len(case.ids))
    whole = "gemma3" in request.node.callspec.params.values()
    first, tokens = case.images()[0], len(case.ids)
    middle = first.stop if whole else (first.start + first.stop) // 2
    for cuts in ([], [middle], [first.stop, tokens - 2, tokens - 1]):
        torch.testing.assert_close(_run(case, decoder, cuts, whole), case.logits, **TIGHT)


def test_media_and_their_order_count(case: Case, request: pytest.FixtureRequest) -> None:
    """What the test above would not notice were it blind."""
    decoder = _fused(case.attached, len(case.ids))
    whole = "gemma3" in request.node.callspec.params.values()
    right = _run(case, decoder, [], whole)
    for index in range(len(case.vectors)):
        vectors = case.vectors.clone()
        vectors[index] = vectors[index].flip(0)
        wrong = _run(Case(**{**_fields(case), "vectors": vectors}), decoder, [], whole)
        assert (wrong - right)[case.rows[-1] :].abs().max() > 0.05
    if case.positions.dim() == 2:
        assert (case.positions != case.positions[0]).any()
        ramp = torch.arange(len(case.ids)).expand(3, -1)  # [3, T]
        wrong = _run(Case(**{**_fields(case), "positions": ramp}), decoder, [], whole)
        assert (wrong - right).abs().max() > 0.05


def _fields(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in Case.__dataclass_fields__}


def test_images_of_gemma_behind_its_own_forward(gemma: Case) -> None:
    """transformers' forward calls our attention function, which finds `last_keys` in the step."""
    model, tokens = gemma.attached.model, len(gemma.ids)
    embeddings = model.get_input_embeddings()(gemma.ids)  # [T, D]
    embeddings[gemma.rows] = gemma.vectors[0]

    def forward() -> torch.Tensor:
        positions = gemma.positions[None]  # [1, T]
        return model(inputs_embeds=embeddings[None], position_ids=positions).logits[0]  # [T, V]

    with cache_of(gemma.attached, tokens) as table:
        right, causal = (
            run_step(gemma.attached, table, range(tokens), gemma.positions, last_keys, forward)
            for last_keys in (gemma.last_keys(range(tokens)), None)
        )
    torch.testing.assert_close(right, gemma.logits, **TIGHT)
    assert (causal - right).abs().max() > 1.0


# --- M-RoPE on random input ------------------------------------------------------------


@pytest.mark.parametrize("family", M_ROPE)
def test_random_positions_in_three_dimensions(family: str) -> None:
    """Every layer's output and the logits, in fp32, against the family's own text model."""
    own = random_text(family)
    attached = attach_text(own.model, own.lm_head)
    decoder = _fused(attached, 40)
    ids, positions = torch.randint(320, (40,)), torch.randint(256, (3, 40))  # [T], [3, T]
    wanted, hidden = _own(own, input_ids=ids[None], position_ids=positions[:, None])

    def forward() -> torch.Tensor:
        seen: list[torch.Tensor] = []
        residual = decoder.embedding(ids)  # [T, D]
        norms = [layer.before_attention for layer in decoder.layers]
        x = rms_norm(residual, norms[0].weight, norms[0].eps, norms[0].mode)  # [T, D]
        for layer, following in zip(decoder.layers, [*norms[1:], decoder.final], strict=True):
            table = decoder.tables[layer.rope]
            x, residual = layer.forward(x, residual, following, table, attached.batch)
            seen.append(residual)
        return torch.stack(seen)  # [L, T, D]

    with cache_of(attached, 40) as blocks:
        placed = _place(decoder, positions)
        layers = run_step(attached, blocks, range(40), placed, None, forward)
        logits = run_step(attached, blocks, range(40), placed, None, lambda: decoder.forward(ids))
    torch.testing.assert_close(layers, hidden, **TIGHT)
    torch.testing.assert_close(logits, wanted, **TIGHT)


def _own(model: TextModel, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] and what each layer gives [L, T, D] by the model itself."""
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0]))  # [T, D]
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0]  # [T, V]
    return logits, torch.stack(seen)

"""Starting the ranks of an engine together, and rank 0's runner, which takes the others along."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from loramux.adapters.weights import AdapterWeights, Vectors
from loramux.config import EngineConfig, ModelFacts, resolve
from loramux.engine.plan import AdapterLoad, StepPlan, StepResult
from loramux.engine.runner import Runner, Running
from loramux.engine.team import Team
from loramux.errors import ConfigError
from loramux.models.attach import Attached
from loramux.models.loader import LoadedModel, load_model, pick_device
from loramux.models.processor import MediaProcessor, load_processor

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Started:
    """An engine's model, ready to run."""

    loaded: LoadedModel
    config: EngineConfig  # resolved
    facts: ModelFacts
    runner: Runner | LeadingRunner
    team: Team | None
    processor: MediaProcessor | None = None


@dataclass(frozen=True, slots=True)
class LeadingRunning:
    """A step that was launched on every rank."""

    running: Running
    team: Team

    def read(self) -> StepResult:
        """Of rank 0, which chooses. Raises EngineStopped when a rank is lost."""
        try:
            with self.team.watch.waiting():
                result = self.running.read()
        except Exception as error:
            raise self.team.fail(error) from error
        if self.team.lost is not None:  # what came out may be half a sum
            raise self.team.lost
        return result


class LeadingRunner:
    """A `Runner` as the engine sees it, for all ranks."""

    def __init__(self, runner: Runner, team: Team):
        self._runner = runner
        self._team = team
        self.attached: Attached = runner.attached
        self.num_blocks = runner.num_blocks
        self.run_ahead = runner.run_ahead

    def launch(self, plan: StepPlan) -> Running:
        """See `Runner.launch`. Raises EngineStopped whatever went wrong: the ranks have parted."""
        with self._team.watch.waiting():
            self._team.send(plan.for_others())
            try:
                return LeadingRunning(self._runner.launch(plan), self._team)
            except Exception as error:
                raise self._team.fail(error) from error

    def load(self, load: AdapterLoad, weights: AdapterWeights) -> None:
        """See `Runner.load`: on every rank, or the error of one that could not."""
        self._team.load(load, weights, partial(self._runner.load, load, weights))

    def rehearse(self, weights: AdapterWeights) -> Vectors:
        """See `Runner.rehearse`: on every rank, or the error of one that could not. One at a time."""
        found: dict[str, torch.Tensor] = {}

        def own() -> None:
            found.update(self._runner.rehearse(weights))

        self._team.load(AdapterLoad(weights.ref, 0), weights, own, rehearsal=True)
        return found

    def close(self) -> None:
        """Of this rank; the others leave when `Team.close` tells them to."""
        self._runner.close()
        self._team.leave()


MakeRunner = Callable[[Attached, EngineConfig, ModelFacts], Runner]


def start(config: EngineConfig, make_runner: MakeRunner) -> Started:
    """Load the model on every rank and get ready; `make_runner` makes this rank's.

    Raises ConfigError or UnsupportedModel."""
    if config.tensor_parallel_size == 1:
        loaded = load_model(config)
        processor = _processor(config, loaded)
        facts = replace(loaded.facts, modalities=_modalities(loaded, processor))
        resolved = resolve(config, facts)
        runner = make_runner(loaded.attached, resolved, facts)
        return Started(loaded, resolved, facts, runner, None, processor)
    devices = rank_devices(config)
    threads = max(1, torch.get_num_threads() // len(devices))
    if devices[0] == "cpu":
        torch.set_num_threads(threads)  # the ranks share the cores
    team = Team(devices, config, threads)
    try:
        own = config.model_copy(update={"device": devices[0]})
        return _start_with(team, own, make_runner)
    except Exception as error:
        found = team.explain(error) if not isinstance(error, ConfigError) else error
        team.end()
        raise found from error
    except BaseException:  # Ctrl-C
        team.end()
        raise


def _processor(config: EngineConfig, loaded: LoadedModel) -> MediaProcessor | None:
    """What makes prompts with media, where the model takes any. Random weights may come without."""
    if loaded.attached.towers is None:
        return None
    source = config.tokenizer or config.model
    try:
        return load_processor(
            *(source, config.revision, loaded.attached.model.config, config.chat_template)
        )
    except ConfigError:
        if config.load_format == "dummy":
            return None
        raise


def _modalities(loaded: LoadedModel, processor: MediaProcessor | None) -> tuple[str, ...]:
    if (towers := loaded.attached.towers) is None:
        return ()
    prepared = towers.modalities if processor is None else processor.modalities
    return tuple(sorted(towers.modalities & prepared))


def _start_with(team: Team, config: EngineConfig, make_runner: MakeRunner) -> Started:
    loaded = load_model(config, team.group)
    facts = agreed([loaded.facts, *team.facts()])
    resolved = resolve(config, facts)
    team.resolve(resolved, facts)
    runner = make_runner(loaded.attached, resolved, facts)
    team.wait_ready()
    logger.info("%d ranks run %s", team.size, config.model)
    return Started(loaded, resolved, facts, LeadingRunner(runner, team), team)


def agreed(facts: Sequence[ModelFacts]) -> ModelFacts:
    """Rank 0's facts with what is scarcest of memory on any rank. A CPU's is shared by all."""
    ranks = sharing([fact.device for fact in facts])
    return replace(
        facts[0],
        free_bytes=min(fact.free_bytes for fact in facts) // ranks,
        total_bytes=min(fact.total_bytes for fact in facts) // ranks,
        weight_bytes=max(fact.weight_bytes for fact in facts),
    )


def sharing(devices: Sequence[str]) -> int:
    """How many ranks there are on one of their `devices`, at most."""
    return -(-len(devices) // len(set(devices)))


def rank_devices(config: EngineConfig) -> list[str]:
    """The device of each rank. Raises ConfigError where there are too few GPUs."""
    size, device = config.tensor_parallel_size, pick_device(config.device)
    if device == "cpu":
        return ["cpu"] * size
    if ":" in device:
        raise ConfigError(
            f"device {device!r} is one GPU, and {size} ranks need one each",
            field="device",
            remedy="--device cuda, and CUDA_VISIBLE_DEVICES to choose among them",
        )
    present = torch.cuda.device_count()
    if present < size and not config.enforce_eager:
        raise ConfigError(
            f"{size} ranks need {size} GPUs, and there are {present}",
            field="tensor_parallel_size",
            remedy=f"--tensor-parallel-size {present}; or, to try it out slowly on a shared GPU, "
            "--enforce-eager",
        )
    if present < size:
        logger.warning("%d ranks share %d GPU(s): right, and slow", size, present)
    return [f"cuda:{rank % present}" for rank in range(size)]

"""An evaluation between two steps of training: the held-out loss, and answers to prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from deft.encoding.rows import Example
from deft.encoding.tokenizer import Tokenizer
from deft.evaluation import samples
from deft.evaluation.config import EvaluateConfig
from deft.evaluation.heldout import held_out_loss
from deft.evaluation.prompt_form import RAW, PromptForm
from deft.evaluation.prompts import Prompt
from deft.evaluation.samples import MetricFn, Sample
from deft.training import randomness
from deft.training.state import TrainState


@dataclass(frozen=True, slots=True)
class Evaluator:
    """What is measured at each evaluation of a run, as far as it is asked for: without rows no loss, without prompts
    no answers."""

    held_out: Sequence[Example]
    microbatch_tokens: int
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    settings: EvaluateConfig
    metric_fn: MetricFn | None = None
    form: PromptForm = RAW

    def __call__(self, state: TrainState, write: Callable[[str, Mapping[str, Any]], None]) -> float | None:
        """Writes an "eval" record if anything was measured, and a "sample" for each answer; returns the held-out loss.

        Weights stay. Whatever ends it early, random generators are then as before it. Ranks that share one copy of the
        model measure the same, and draw the same.
        """
        before = randomness.snapshot()
        try:
            if state.shards is not None:
                randomness.follow_first(state.world, f"random numbers at step {state.step}")
            with state.as_served(), state.gathering():
                numbers, answers = self._measure(state)
            if numbers:
                write("eval", {"step": state.step, **numbers})
            for answer in answers:
                write("sample", {"step": state.step, **asdict(answer)})
            return numbers.get("loss")
        except BaseException:
            randomness.restore(before)
            raise

    def _measure(self, state: TrainState) -> tuple[dict[str, float], tuple[Sample, ...]]:
        """Numbers by name (loss, perplexity, metrics/<name>), and the answers."""
        found: dict[str, float] = {}
        if self.held_out:
            found["loss"] = held_out_loss(state.causal_lm, self.held_out, self.microbatch_tokens)
            found["perplexity"] = math.exp(min(found["loss"], 700))
        sample = partial(
            samples.sample,
            state.causal_lm.model,
            self.tokenizer,
            self.prompts,
            self.settings.generate,
            self.settings.stop_sequences,
            self.metric_fn,
            self.form,
        )
        answers = state.causal_lm.inside(sample)
        return {**found, **answers.means}, answers.rows

"""A methods paragraph that can be pasted into a paper."""

from __future__ import annotations

import numpy as np

from klab.reports.comparison import Comparison
from klab.reports.schema import CELLS, TITLES
from klab.reports.study import Study


def methods(study: Study, comparisons: list[Comparison]) -> list[str]:
    """Paragraphs: what was run, and how it was compared."""
    return [_run(study, comparison) for comparison in comparisons] + (
        [_analysis(comparisons[0])] if comparisons else []
    )


def _run(study: Study, comparison: Comparison) -> str:
    cells = study.cells[study.cells["task"] == comparison.task]
    first = study.configurations[comparison.baseline or comparison.groups[0]]
    training = first.training
    axes = ", ".join(f"{axis.title} ({', '.join(axis.values)})" for axis in study.axes) or "nothing"
    ended = cells["state"].isin(["finished", "diverged", "failed", "damaged"]).sum()
    policy = getattr(first.policy, "model", None) or f"a {first.policy.layers}-layer {first.policy.family} transformer"  # type: ignore[union-attr]
    return (
        f"On the task {comparison.task} we compared {len(comparison.groups)} configurations of a KL-regularised "
        f"policy gradient that vary {axes}. "
        f"The policy was {policy}, trained for {training.updates} optimizer updates with {training.prompts} prompts × "
        f"{training.group_size} completions per rollout, {training.optimizer_steps_per_rollout} update(s) per "
        "rollout and AdamW "
        f"(learning rate {training.lr:g} unless varied). Every configuration ran with the training seeds "
        f"{_seeds(comparison.seeds)}; {ended} of {len(cells)} runs had ended. "
        f"Runs used klab {study.runs[0].manifest['versions'].get('klab', '')} and "
        f"PyTorch {study.runs[0].manifest['versions'].get('torch', '')}."
    )


def _analysis(comparison: Comparison) -> str:
    lost = int(comparison.table[["diverged", "failed"]].sum().sum())
    return (
        f"The score is the {TITLES[comparison.metric]} ({CELLS[comparison.metric]}), one number per configuration "
        "and training seed. Intervals are 95% "
        "Student t-intervals over seeds. Runs that diverged or failed were kept and given the worst score seen on "
        "the task"
        f"{f' ({lost} runs)' if lost else ' (there were none)'}. Configurations were compared with the baseline on "
        "the same seeds: mean paired "
        "difference, t-interval, and the exact sign-flip permutation test, adjusted by Holm over all configurations. "
        "Configurations without lost "
        "runs were ranked and grouped by Tukey's test at 5% on the additive model score = configuration + seed"
        + (
            f" ({comparison.freedom} degrees of freedom, residual standard deviation {np.sqrt(comparison.error):.3g})"
            if comparison.freedom
            else ""
        )
        + ". Effects of axes and their two-way interactions were fitted by least squares with seeds as blocks and "
        "tested against the pure error "
        "between seeds; configurations with lost runs have their own variance (Satterthwaite degrees of freedom, "
        "ANOVA-type statistic). Axes were "
        "adjusted by Holm. An axis that is inactive in a configuration counts as its reference value."
    )


def _seeds(seeds: tuple[int, ...]) -> str:
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(str(seed) for seed in seeds[:20]) + (", …" if len(seeds) > 20 else "")

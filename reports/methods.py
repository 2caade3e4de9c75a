"""A methods paragraph that can be pasted into a paper."""

from __future__ import annotations

from klab.reports.comparison import Comparison
from klab.reports.conduct import methods_words
from klab.reports.findings import noise_words
from klab.reports.study import Study


def methods(study: Study, comparisons: list[Comparison]) -> list[str]:
    """Paragraphs: what was run, and how it was compared."""
    if not comparisons:
        return []
    runs = [_run(study, comparison) for comparison in comparisons]
    return [*runs, _analysis(comparisons[0]), methods_words(study.conduct)]


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
    analysis = comparison.analysis
    diverged = int(comparison.table["diverged"].sum())
    missing = int((comparison.table["seeds"] - comparison.table["n"]).sum())
    return (
        f"The score is the {comparison.score.title}: {comparison.score.meaning}; one number per training run. "
        f"{noise_words(comparison)} Diverged runs count as the worst score of a finished run ({diverged} runs); runs "
        f"that failed, have not ended or have no score are missing data ({missing} runs). The model of a task is "
        "score[c, s] = μ[c] + b[s] + Σ_a u[a, v_a(c), s] + ε[c, s] for cell c and seed s, with independent normal "
        "seed blocks b, seed × axis terms u (for axes that the design crosses) and run errors ε whose variance may "
        "differ from cell to cell. Variances of seed × axis are estimated by Henderson's method III (1953), those of "
        "cells by empirical Bayes (Smyth 2004). A contrast is the mean difference between a cell and the baseline "
        "within the seeds that both have; its degrees of freedom are Satterthwaite's (1946). Intervals and adjusted p "
        "of all contrasts come from the distribution of the largest |t|, simulated with its correlations and unequal "
        "variances (Dunnett 1955; Hothorn, Bretz and Westfall 2008; Hasler and Hothorn 2008), those of axes and pairs "
        "of axes from Šidák's inequality (1967). All verdicts together err with probability "
        f"{analysis.alpha:.3g} where nothing differs; p < 0.05 exactly when the interval excludes 0. A difference is "
        f"called equivalent when its interval lies within ±{analysis.delta:g}, and undecided when neither holds. The "
        "intervals of means are simultaneous over all cells, so that that of the best cell holds although it was "
        "chosen for its mean (Berk et al. 2013). An axis that does nothing in a cell counts as having the baseline's "
        "value there."
    )


def _seeds(seeds: tuple[int, ...]) -> str:
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(str(seed) for seed in seeds[:20]) + (", …" if len(seeds) > 20 else "")

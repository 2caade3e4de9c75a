"""A methods paragraph that can be pasted into a paper."""

from __future__ import annotations

from klab.grid.schema.training import TrainingSection
from klab.reports.comparison import Comparison
from klab.reports.conduct import methods_words
from klab.reports.findings import noise_words
from klab.reports.formulas import sentence as baseline_sentence
from klab.reports.software import words as software_words
from klab.reports.study import Study
from klab.reports.tuned import methods_words as tuning_words


def methods(study: Study, comparisons: list[Comparison]) -> list[str]:
    """Paragraphs: what was run, and how it was compared."""
    if not comparisons:
        return []
    runs = [_run(study, comparison) for comparison in comparisons]
    return [*runs, *_stopping(study), tuning_words(study), *_analysis(comparisons), methods_words(study.conduct)]


def _stopping(study: Study) -> list[str]:
    """What ended hopeless runs, and how these count; nothing where no configuration has such a rule."""
    rules = [cell.training.stop for cell in study.configurations.values() if cell.training.stop is not None]
    if not rules:
        return []
    words = dict.fromkeys(rule.words for rule in rules)
    where = "" if len(rules) == len(study.configurations) else f" in {len(rules)} of {len(study.configurations)} cells"
    return [
        f"Hopeless runs were stopped after an evaluation on held-out prompts {'; or '.join(words)}{where}: "
        f"{int((study.cells['state'] == 'stopped').sum())} runs. Their scores are censored: the last evaluation is "
        "carried forward, and every verdict was computed again with stopped runs at the worst and at the best score of "
        "the task, against the baseline's at the other end."
    ]


def _run(study: Study, comparison: Comparison) -> str:
    cells = study.cells[study.cells["task"] == comparison.task]
    first = study.configurations[comparison.baseline or comparison.groups[0]]
    training = first.training
    axes = ", ".join(f"{axis.title} ({', '.join(axis.values)})" for axis in study.axes) or "nothing"
    ended = cells["state"].isin(["finished", "diverged", "stopped", "failed", "damaged"]).sum()
    policy = getattr(first.policy, "model", None) or f"a {first.policy.layers}-layer {first.policy.family} transformer"  # type: ignore[union-attr]
    return (
        f"On the task {comparison.task} we compared {len(comparison.groups)} configurations of a KL-regularised "
        f"policy gradient that vary {axes}. {baseline_sentence(study, comparison)}"
        f"The policy was {policy}, trained for {training.updates} optimizer updates with {training.prompts} prompts × "
        f"{training.group_size} completions per rollout, {training.optimizer_steps_per_rollout} update(s) per "
        f"rollout and {_optimizer(training)} "
        f"({_learning_rate(study, training.lr)}). Every configuration ran with the training seeds "
        f"{_seeds(comparison.seeds)}; {ended} of {len(cells)} runs had ended. "
        f"{_engine(study)}Runs used {software_words(study.software, study.runs[0].manifest, _has_models(study))}."
    )


def _optimizer(training: TrainingSection) -> str:
    return "AdamW" if training.trl is None else str(training.trl.fields.get("optim", "AdamW"))


def _engine(study: Study) -> str:
    """Who trained, where it was not klab's own engine, or not for all configurations."""
    engines = {each.training.engine for each in study.configurations.values()}
    if engines == {"klab"}:
        return ""
    which = "Configurations with the engine trl" if len(engines) > 1 else "They"
    return f"{which} were trained by TRL's GRPOTrainer with klab's objective as its loss. "


def _has_models(study: Study) -> bool:
    """Whether models of the library Transformers were trained."""
    return any(each.policy.name == "hf" or each.training.engine == "trl" for each in study.configurations.values())


def _learning_rate(study: Study, lr: float) -> str:
    tuned = any(each.tuned is not None and "training.lr" in each.tuned.keys for each in study.arms)
    return "learning rate as every configuration chose it" if tuned else f"learning rate {lr:g} unless varied"


def _analysis(comparisons: list[Comparison]) -> list[str]:
    comparison, analysis = comparisons[0], comparisons[0].analysis
    diverged = sum(int(each.table["diverged"].sum()) for each in comparisons)
    missing = sum(int((each.table["seeds"] - each.table["n"]).sum()) for each in comparisons)
    score = comparison.score
    return [
        f"The score is the {score.title}: {score.meaning}; one number per training run. {noise_words(comparison)} "
        f"Diverged runs count as the worst score of a finished or stopped run of the task ({diverged} runs); runs that "
        f"failed, have not ended or have no score are missing data ({missing} runs).",
        "The model of a task is score[c, s] = μ[c] + b[s] + Σ_a u[a, v_a(c), s] + ε[c, s] for cell c and seed s, with "
        "independent normal terms: b the seed as a block (variance θ), u seed × axis (variances τ²[a], for axes that "
        "the design crosses), ε the run (variance σ²[c], which may differ from cell to cell). τ² is estimated by "
        "Henderson's method III (1953), σ² by empirical Bayes (Smyth 2004). Every estimate is a weighted sum of runs, "
        "Σ w·score: a contrast is the mean difference between a cell and the baseline within the seeds that both have; "
        "the effect of a value of an axis, and the interaction of two, are means of such differences over the cells "
        "that differ in nothing else. Its variance is Σ_c σ²[c]·Σ w² + Σ_a τ²[a]·Σ_{v,s} (Σ w)² + θ·Σ_s (Σ w)², its "
        "degrees of freedom are Satterthwaite's (1946).",
        "Intervals and adjusted p of contrasts come from the distribution of the largest |t| among them, simulated "
        "with their correlations and unequal variances (Dunnett 1955; Hothorn, Bretz and Westfall 2008; Hasler and "
        "Hothorn 2008), those of axes and pairs of axes from Šidák's inequality (1967). All verdicts of a task "
        f"together err with probability {analysis.alpha:.3g} where nothing differs; p < 0.05 exactly when the interval "
        f"excludes 0. A difference is called equivalent when its interval lies within ±{analysis.delta:g}, undecided "
        "when it is neither. The intervals of means are simultaneous over all cells, so that that of the best cell "
        "holds although it was chosen for its mean (Berk, Brown, Buja, Zhang and Zhao 2013). An axis that does nothing "
        "in a cell counts as having the baseline's value there.",
    ]


def _seeds(seeds: tuple[int, ...]) -> str:
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(str(seed) for seed in seeds[:20]) + (", …" if len(seeds) > 20 else "")

"""The literature and software that klab's axis values, algorithms and claims come from: one table of citations.

Texts cite a source by its label (`Bai & Zhang 2026`), which is unique; `klab axes --sources` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Source:
    """One document or program.

    Attributes:
        label: how texts cite it; unique.
        authors: empty where the document names none.
        year: empty where the document names none.
        title: as printed.
        where: arXiv number, DOI, address or venue.
    """

    label: str
    authors: str
    year: str
    title: str
    where: str = ""


_ALL = (
    Source(
        "Agarwal et al. 2021",
        "Rishabh Agarwal et al.",
        "2021",
        "Deep Reinforcement Learning at the Edge of the Statistical Precipice",
        "arXiv:2108.13264",
    ),
    Source(
        "Ahmadian et al. 2024",
        "Arash Ahmadian et al.",
        "2024",
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs (RLOO)",
        "arXiv:2402.14740",
    ),
    Source(
        "Amini et al. 2025",
        "Afra Amini et al.",
        "2025",
        "Better Estimation of the Kullback-Leibler Divergence Between Language Models",
        "arXiv:2504.10637",
    ),
    Source(
        "Bai & Zhang 2026",
        "Hao Bai, Tong Zhang",
        "2026",
        "Token-Level KL-Regularized Policy Gradient and GRPO",
        "blog post, 2 April 2026",
    ),
    Source(
        "Chen et al. 2021",
        "Mark Chen et al.",
        "2021",
        "Evaluating Large Language Models Trained on Code (pass@k)",
        "arXiv:2107.03374",
    ),
    Source(
        "Chu et al. 2025",
        "Xiangxiang Chu et al.",
        "2025",
        "GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning",
        "arXiv:2504.02546",
    ),
    Source(
        "Colas et al. 2018",
        "Cédric Colas et al.",
        "2018",
        "How Many Random Seeds? Statistical Power Analysis in Deep Reinforcement Learning Experiments",
        "arXiv:1806.08295",
    ),
    Source(
        "Cressie & Read 1984",
        "Noel Cressie, Timothy R. C. Read",
        "1984",
        "Multinomial Goodness-of-Fit Tests",
        "Journal of the Royal Statistical Society B 46(3)",
    ),
    Source(
        "Cui et al. 2025",
        "Ganqu Cui et al.",
        "2025",
        "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models (Clip-Cov, KL-Cov)",
        "arXiv:2505.22617",
    ),
    Source(
        "Davis & Recht 2025",
        "Damek Davis, Benjamin Recht",
        "2025",
        "What is the objective of reasoning with reinforcement learning?",
        "arXiv:2510.13651",
    ),
    Source(
        "DeepSeek-AI 2025a",
        "DeepSeek-AI",
        "2025",
        "DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement Learning",
        "arXiv:2501.12948",
    ),
    Source(
        "DeepSeek-AI 2025b",
        "DeepSeek-AI",
        "2025",
        "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models",
        "arXiv:2512.02556",
    ),
    Source(
        "From Estimation to Optimization",
        "",
        "",
        "From Estimation to Optimization: KL Regularization in RLHF",
        "blog post without author or date",
    ),
    Source(
        "Gao et al. 2024",
        "Leo Gao et al.",
        "2024",
        "The Language Model Evaluation Harness",
        "doi:10.5281/zenodo.12608602",
    ),
    Source(
        "Gao et al. 2025", "Chang Gao et al.", "2025", "Soft Adaptive Policy Optimization (SAPO)", "arXiv:2511.20347"
    ),
    Source(
        "GRPO and Log-Ratio-Based Regularization",
        "",
        "",
        "GRPO and Log-Ratio-Based Regularization: Key Concepts",
        "note without author or date",
    ),
    Source(
        "Hao et al. 2025",
        "Yaru Hao et al.",
        "2025",
        "On-Policy RL with Optimal Reward Baseline (OPO)",
        "arXiv:2505.23585",
    ),
    Source(
        "He et al. 2025",
        "Jujie He et al.",
        "2025",
        "Skywork Open Reasoner 1 Technical Report",
        "arXiv:2505.22312",
    ),
    Source(
        "Henderson et al. 2018",
        "Peter Henderson et al.",
        "2018",
        "Deep Reinforcement Learning that Matters",
        "arXiv:1709.06560",
    ),
    Source(
        "Hochlehnert et al. 2025",
        "Andreas Hochlehnert et al.",
        "2025",
        "A Sober Look at Progress in Language Model Reasoning: Pitfalls and Paths to Reproducibility",
        "arXiv:2504.07086",
    ),
    Source(
        "Hu et al. 2021",
        "Edward J. Hu et al.",
        "2021",
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "arXiv:2106.09685",
    ),
    Source(
        "Hu et al. 2025",
        "Jian Hu et al.",
        "2025",
        "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models",
        "arXiv:2501.03262",
    ),
    Source(
        "Ionides 2008",
        "Edward L. Ionides",
        "2008",
        "Truncated Importance Sampling",
        "Journal of Computational and Graphical Statistics 17(2)",
    ),
    Source(
        "Jeffreys 1946",
        "Harold Jeffreys",
        "1946",
        "An Invariant Form for the Prior Probability in Estimation Problems",
        "Proceedings of the Royal Society A 186(1007)",
    ),
    Source(
        "Jiosi 2026", "Jordan Jiosi", "2026", "DeepSeek's GRPO Notation & Why It's Wrong", "doi:10.5281/zenodo.18396691"
    ),
    Source(
        "Khatri et al. 2025",
        "Devvrit Khatri et al.",
        "2025",
        "The Art of Scaling Reinforcement Learning Compute for LLMs (ScaleRL)",
        "arXiv:2510.13786",
    ),
    Source(
        "Kimi Team 2026",
        "Kimi Team",
        "2026",
        "Kimi K2.5: Visual Agentic Intelligence",
        "arXiv:2602.02276",
    ),
    Source(
        "Kong 1992",
        "Augustine Kong",
        "1992",
        "A Note on Importance Sampling Using Standardized Weights",
        "University of Chicago, technical report 348",
    ),
    Source(
        "Le Roux et al. 2025",
        "Nicolas Le Roux et al.",
        "2025",
        "Tapered Off-Policy REINFORCE: Stable and Efficient Reinforcement Learning for LLMs (TOPR)",
        "arXiv:2503.14286",
    ),
    Source(
        "Lei et al. 2026",
        "Lei et al.",
        "2026",
        "A Step Back: Prefix Importance Ratio Stabilizes Policy Optimization (MinPRO)",
        "arXiv:2601.22718",
    ),
    Source(
        "Li et al. 2023",
        "Ziniu Li et al.",
        "2023",
        "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language Models",
        "arXiv:2310.10505",
    ),
    Source(
        "Li et al. 2025",
        "Yingru Li et al.",
        "2025",
        "Trust Region Masking for Long-Horizon LLM Reinforcement Learning (TRM)",
        "arXiv:2512.23075",
    ),
    Source(
        "Ling Team 2025",
        "Ling Team",
        "2025",
        "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model (IcePop)",
        "arXiv:2510.18855",
    ),
    Source(
        "Liu et al. 2025a",
        "Kezhao Liu et al.",
        "2025",
        "Rethinking KL Regularization in RLHF: From Value Estimation to Gradient Optimization",
        "arXiv:2510.01555",
    ),
    Source(
        "Liu et al. 2025b",
        "Zichen Liu et al.",
        "2025",
        "Understanding R1-Zero-Like Training: A Critical Perspective (Dr. GRPO)",
        "arXiv:2503.20783",
    ),
    Source(
        "Liu et al. 2025c",
        "Zihe Liu et al.",
        "2025",
        "Part I: Tricks or Traps? A Deep Dive into RL for LLM Reasoning (Lite-PPO)",
        "arXiv:2508.08221",
    ),
    Source(
        "Liu et al. 2026a",
        "Fanfan Liu et al.",
        "2026",
        "Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in RLVR",
        "arXiv:2602.05261",
    ),
    Source(
        "Liu et al. 2026b",
        "Shih-Yang Liu et al.",
        "2026",
        "GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization",
        "arXiv:2601.05242",
    ),
    Source(
        "Loshchilov & Hutter 2019",
        "Ilya Loshchilov, Frank Hutter",
        "2019",
        "Decoupled Weight Decay Regularization (AdamW)",
        "arXiv:1711.05101",
    ),
    Source(
        "Ma et al. 2026",
        "Chiyu Ma et al.",
        "2026",
        "FIPO: Eliciting Deep Reasoning with Future-KL Influenced Policy Optimization",
        "arXiv:2603.19835",
    ),
    Source(
        "Mao et al. 2026",
        "Renjie Mao et al.",
        "2026",
        "Beyond Uniform Token-Level Trust Region in LLM Reinforcement Learning (CPPO)",
        "arXiv:2606.10968; code: Tencent-Hunyuan/UniRL",
    ),
    Source(
        "MiniMax 2025",
        "MiniMax",
        "2025",
        "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention (CISPO)",
        "arXiv:2506.13585",
    ),
    Source("NeMo-RL", "NVIDIA", "", "NeMo RL", "github.com/NVIDIA-NeMo/RL"),
    Source("open-instruct", "Allen Institute for AI", "", "open-instruct", "github.com/allenai/open-instruct"),
    Source("OpenRLHF", "Jian Hu et al.", "2024", "OpenRLHF", "arXiv:2405.11143; github.com/OpenRLHF/OpenRLHF"),
    Source(
        "Ouyang et al. 2022",
        "Long Ouyang et al.",
        "2022",
        "Training language models to follow instructions with human feedback (InstructGPT)",
        "arXiv:2203.02155",
    ),
    Source(
        "Precup et al. 2000",
        "Doina Precup, Richard S. Sutton, Satinder Singh",
        "2000",
        "Eligibility Traces for Off-Policy Policy Evaluation",
        "ICML 2000",
    ),
    Source(
        "Prime Intellect 2025",
        "Prime Intellect Team",
        "2025",
        "INTELLECT-2: A Reasoning Model Trained Through Globally Decentralized Reinforcement Learning",
        "arXiv:2505.07291",
    ),
    Source(
        "prime-rl",
        "Prime Intellect",
        "2026",
        "prime-rl, the loss of its trainer",
        "github.com/PrimeIntellect-ai/prime-rl",
    ),
    Source(
        "Qi et al. 2026",
        "Penghui Qi et al.",
        "2026",
        "Rethinking the Trust Region in LLM Reinforcement Learning (DPPO)",
        "arXiv:2602.04879",
    ),
    Source("Schulman 2020", "John Schulman", "2020", "Approximating KL Divergence", "joschu.net/blog/kl-approx.html"),
    Source(
        "Schulman et al. 2016",
        "John Schulman et al.",
        "2016",
        "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        "arXiv:1506.02438",
    ),
    Source(
        "Schulman et al. 2017",
        "John Schulman et al.",
        "2017",
        "Proximal Policy Optimization Algorithms",
        "arXiv:1707.06347",
    ),
    Source(
        "Sennrich et al. 2016",
        "Rico Sennrich et al.",
        "2016",
        "Neural Machine Translation of Rare Words with Subword Units",
        "arXiv:1508.07909",
    ),
    Source(
        "Shah et al. 2025",
        "Vedant Shah et al.",
        "2025",
        "A Comedy of Estimators: On KL Regularization in RL Training of LLMs",
        "arXiv:2512.21852",
    ),
    Source(
        "Shao et al. 2024",
        "Zhihong Shao et al.",
        "2024",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (GRPO)",
        "arXiv:2402.03300",
    ),
    Source(
        "Shen et al. 2026",
        "Guobin Shen et al.",
        "2026",
        "VESPO: Variational Sequence-Level Soft Policy Optimization for Off-Policy LLM Training",
        "arXiv:2602.10693",
    ),
    Source(
        "Stojanovski et al. 2025",
        "Zafir Stojanovski et al.",
        "2025",
        "REASONING GYM: Reasoning Environments for Reinforcement Learning with Verifiable Rewards",
        "arXiv:2505.24760",
    ),
    Source(
        "Su et al. 2021",
        "Jianlin Su et al.",
        "2021",
        "RoFormer: Enhanced Transformer with Rotary Position Embedding",
        "arXiv:2104.09864",
    ),
    Source(
        "Tajwar et al. 2026",
        "Fahim Tajwar et al.",
        "2026",
        "Maximum Likelihood Reinforcement Learning (MaxRL)",
        "arXiv:2602.02710",
    ),
    Source(
        "Tang & Munos 2025",
        "Yunhao Tang, Rémi Munos",
        "2025",
        "On a few pitfalls in KL divergence gradient estimation for RL",
        "arXiv:2506.09477",
    ),
    Source(
        "Tang et al. 2025",
        "Yunhao Tang et al.",
        "2025",
        "Optimizing Language Models for Inference Time Objectives using Reinforcement Learning",
        "arXiv:2503.19595",
    ),
    Source("TRL", "Leandro von Werra et al.", "", "TRL, version 1.16.0", "github.com/huggingface/trl"),
    Source("verl", "Guangming Sheng et al.", "", "verl, version 0.9.1", "arXiv:2409.19256; github.com/volcengine/verl"),
    Source(
        "Wang et al. 2025",
        "Shenzhi Wang et al.",
        "2025",
        "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM Reasoning",
        "arXiv:2506.01939",
    ),
    Source(
        "Why GRPO Uses r − log r − 1",
        "",
        "",
        "Why GRPO Uses r - log r - 1 for the KL Term, Instead of Just log Ratio",
        "note without author or date",
    ),
    Source(
        "Williams 1992",
        "Ronald J. Williams",
        "1992",
        "Simple statistical gradient-following algorithms for connectionist reinforcement learning (REINFORCE)",
        "Machine Learning 8",
    ),
    Source(
        "Xiong et al. 2025",
        "Wei Xiong et al.",
        "2025",
        "A Minimalist Approach to LLM Reasoning: from Rejection Sampling to Reinforce (RAFT, RAFT++, Reinforce-Rej)",
        "arXiv:2504.11343",
    ),
    Source(
        "Yao et al. 2025",
        "Feng Yao et al.",
        "2025",
        "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training (TIS)",
        "blog post",
    ),
    Source(
        "Yao et al. 2026a",
        "Jiarui Yao et al.",
        "2026",
        "Future-KL Regularized GRPO: Process-Level Credit Assignment from f-Divergence Regularization (FRPO)",
        "arXiv:2601.10201",
    ),
    Source(
        "Yao et al. 2026b",
        "Jiarui Yao et al.",
        "2026",
        "Rethinking the Divergence Regularization in LLM RL (DRPO)",
        "arXiv:2606.09821; code: Tencent-Hunyuan/UniRL",
    ),
    Source(
        "Ye et al. 2020",
        "Deheng Ye et al.",
        "2020",
        "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning (dual clip)",
        "arXiv:1912.09729",
    ),
    Source(
        "Yu et al. 2025",
        "Qiying Yu et al.",
        "2025",
        "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
        "arXiv:2503.14476",
    ),
    Source(
        "Zhang et al. 2025",
        "Yifan Zhang et al.",
        "2025",
        "On the Design of KL-Regularized Policy Gradient Algorithms for LLM Reasoning (RPG)",
        "arXiv:2505.17508",
    ),
    Source(
        "Zhang et al. 2026",
        "Yuheng Zhang et al.",
        "2026",
        "Rethinking Importance Sampling in LLM Policy Optimization: A Cumulative Token Perspective (CTPO)",
        "arXiv:2605.07331",
    ),
    Source(
        "Zhao et al. 2025",
        "Yuzhong Zhao et al.",
        "2025",
        "Geometric-Mean Policy Optimization (GMPO)",
        "arXiv:2507.20673",
    ),
    Source(
        "Zheng et al. 2025a",
        "Chujie Zheng et al.",
        "2025",
        "Group Sequence Policy Optimization (GSPO)",
        "arXiv:2507.18071",
    ),
    Source(
        "Zheng et al. 2025b",
        "Chujie Zheng et al.",
        "2025",
        "Stabilizing Reinforcement Learning with LLMs: Formulation and Practices (MiniRL)",
        "arXiv:2512.01374",
    ),
    Source(
        "Zheng et al. 2025c",
        "Haizhong Zheng, Jiawei Zhao, Beidi Chen",
        "2025",
        "Prosperity before Collapse: How Far Can Off-Policy RL Reach with Stale Data on LLMs? (M2PO)",
        "arXiv:2510.01161",
    ),
    Source(
        "Ziegler et al. 2019",
        "Daniel M. Ziegler et al.",
        "2019",
        "Fine-Tuning Language Models from Human Preferences",
        "arXiv:1909.08593",
    ),
)

SOURCES: Mapping[str, Source] = MappingProxyType({source.label: source for source in _ALL})
"""Every source by its label, in alphabetical order."""


def cited(text: str) -> tuple[Source, ...]:
    """The sources that a text cites by their labels, in the order of the table."""
    return tuple(source for label, source in SOURCES.items() if label in text)


def sources_of(texts: Iterable[str]) -> tuple[Source, ...]:
    """The sources that any of some texts cites, each once."""
    return cited("\n".join(texts))

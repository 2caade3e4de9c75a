"""Axis values of the user's own in printed formulas: named functions, explained by their import path."""

from __future__ import annotations

from klab.grid.catalogue import Value

_FORMS = {
    "estimator": r"\operatorname{NAME}(\kappa_{j})",
    "divergence": r"\operatorname{NAME}(\kappa_{j})",
    "ratio": r"\operatorname{NAME}_{j}(\lambda)",
    "weight": r"\operatorname{NAME}(\rho_{j}, A_{j})",
    "advantage": r"\operatorname{NAME}_{j}(r)",
    "aggregation": r"\operatorname{NAME}(x_{j})",
    "placement": (
        r"r_{j} = R - \sum_{i=j}^{H} \operatorname{NAME}_{i}^{\mathrm{reward}}(\varphi),\quad "
        r"u_{j} = \mathbf{1}[j = H] R - \operatorname{NAME}_{j}^{\mathrm{reward}}(\varphi),\quad "
        r"A_{j} = a_{j} - \operatorname{NAME}_{j}^{\mathrm{advantage}}(\varphi),\quad "
        r"K_{j} = \operatorname{NAME}_{j}^{\mathrm{loss}}(\varphi, \log \rho)"
    ),
    "path": r"s_{j} = \operatorname{NAME}(\ell_{j}, \log \rho_{j})",
}
"""What is printed for a function by its axis."""

_GRADIENTS = {
    "estimator": r"\nabla \varphi_{j}",
    "ratio": r"\nabla \log \rho_{j}",
    "placement": r"\nabla \operatorname{NAME}_{j}^{\mathrm{loss}}(\varphi, \log \rho)",
    "path": r"\nabla \operatorname{NAME}(\ell_{j}, \log \rho_{j})",
}


def function_name(path: str) -> str:
    """The name under which a function is printed: the last part of its import path."""
    return path.rpartition(":")[2].rpartition(".")[2]


def custom_divergence(path: str, estimator: str) -> tuple[str, str]:
    """An estimator of a divergence of the user's own, and its gradient."""
    return rf"\operatorname{{{function_name(path)}}}^{{\mathrm{{{estimator}}}}}(\kappa_{{j}})", r"\nabla \varphi_{j}"


def custom_value(axis: str, path: str) -> Value:
    """An entry of the catalogue's form for a function of the user's own."""
    name = function_name(path)
    latex, gradient = _FORMS[axis].replace("NAME", name), _GRADIENTS.get(axis, "").replace("NAME", name)
    return Value(path, f"{name}(…)", "custom", path, latex=latex, gradient=gradient)

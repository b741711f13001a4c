"""Mixed-integer linear programs, and the solvers that redan can ask: SCIP, HiGHS, Gurobi.

A verifier asks for a sign, not for a minimum. A solver is therefore told where to stop: at a solution below
``stop_below``, or once no solution can be at or below ``stop_above``. The latter is given to it as a cutoff, by which
it throws away every branch that lies above, rather than as a condition it looks at from time to time.

How far a bound can be trusted. Of a linear program the bound is computed here, from the solver's dual values, in a way
that is right whatever these are (Neumaier and Shcherbina, Safe bounds in linear and mixed-integer linear programming,
2004). A branch-and-bound tree cannot be looked at so; its bound rests on the solver. Its nodes are dual feasible up to
``DUAL_TOLERANCE``, by which each column can gain that much of its range: the sum of this is taken off the bound. What
a solver's presolving and cuts lose to their own tolerances is not covered.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from redan.errors import UserError, unknown

Solver = Literal["auto", "scip", "highs", "gurobi"]
Status = Literal["optimal", "infeasible", "above", "below", "timeout"]
Vector = NDArray[np.float64]

DUAL_TOLERANCE = 1e-7
PACKAGES = {"scip": "pyscipopt", "highs": "highspy", "gurobi": "gurobipy"}


@dataclass(frozen=True, eq=False)
class Program:
    """Minimise ``cost x + offset`` subject to ``row_lower <= matrix x <= row_upper`` and ``lower <= x <= upper``.

    Attributes:
        cost: ``(columns,)``.
        offset: added to the objective.
        matrix: ``(rows, columns)``.
        row_lower: ``(rows,)``, -inf where there is none.
        row_upper: ``(rows,)``, inf where there is none.
        lower: ``(columns,)``, finite.
        upper: ``(columns,)``, finite.
        integral: which columns must be whole numbers, ``(columns,)``.
        priorities: of columns to branch on, higher ones first, ``(columns,)``; None leaves it to the solver, and HiGHS
            always decides itself.
    """

    cost: Vector
    offset: float
    matrix: csr_array
    row_lower: Vector
    row_upper: Vector
    lower: Vector
    upper: Vector
    integral: NDArray[np.bool_]
    priorities: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.lower).all() and np.isfinite(self.upper).all()):
            raise ValueError("every column needs finite bounds: without them no bound of the objective is safe")


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver found.

    Attributes:
        bound: no solution is below; inf where there is none at all. Of a program that was stopped at ``stop_above``, a
            number above it.
        value: of the best solution found, feasible up to the solver's tolerance of some 1e-6, or None.
        x: that solution, ``(columns,)``, or None.
        status: ``optimal``; ``infeasible``; ``above``, no solution at or below ``stop_above``; ``below``, a solution
            under ``stop_below``; ``timeout``.
    """

    bound: float
    value: float | None
    x: Vector | None
    status: Status


@dataclass(frozen=True, eq=False)
class _Answer:
    """What a solver says, without the objective's offset."""

    dual: float
    x: Vector | None
    finished: bool


def solve(
    program: Program,
    *,
    solver: Solver = "auto",
    timeout: float,
    stop_below: float | None = None,
    stop_above: float | None = None,
    threads: int = 1,
) -> Solution:
    """Minimise; Ctrl-C ends the solver and raises KeyboardInterrupt.

    Args:
        program: what to solve.
        solver: ``auto`` takes the first that is installed of SCIP (for linear programs HiGHS), HiGHS (SCIP), Gurobi.
            Gurobi needs a licence of the user's own and was never run by redan's authors.
        timeout: seconds on the clock.
        stop_below: a solution below is enough.
        stop_above: a bound above is enough.
        threads: of HiGHS and Gurobi; SCIP takes one.

    Raises:
        UserError: where the solver's package is not installed.
    """
    linear = not program.integral.any()
    name = choose(solver, linear=linear)
    slack = 0.0 if linear and name == "highs" else DUAL_TOLERANCE * float((program.upper - program.lower).sum())
    below = -np.inf if stop_below is None else stop_below - program.offset
    # So far above that the bound is still above once the slack is taken off.
    above = np.inf if stop_above is None else stop_above - program.offset + 1.001 * slack + 1e-9
    if len(program.cost):
        answer = {"scip": _scip, "highs": _highs, "gurobi": _gurobi}[name](program, timeout, below, above, threads)
    elif (program.row_lower <= 0).all() and (program.row_upper >= 0).all():
        answer = _Answer(0.0, np.zeros(0), True)
    else:
        answer = _Answer(np.inf, None, True)

    bound = min(answer.dual, above) - slack + program.offset
    value = None if answer.x is None else float(program.cost @ answer.x) + program.offset
    status: Status = "timeout"
    if stop_above is not None and bound > stop_above:
        status = "above"
    elif value is not None and stop_below is not None and value < stop_below:
        status = "below"
    elif answer.finished:
        status = "infeasible" if answer.x is None else "optimal"
    return Solution(bound, value, answer.x, status)


def safe_bound(program: Program, duals: Vector) -> float:
    """A lower bound of a program's objective, without the offset, from any numbers ``y`` for duals of its rows.

    With ``r = c - A' y``: ``c x = y (A x) + r x``, each term at its least. The better the duals, the better the bound.

    Args:
        program: whether its columns are whole numbers is ignored.
        duals: ``(rows,)``.
    """
    side = np.where(duals > 0, program.row_lower, program.row_upper)
    y = np.where(np.isfinite(side), duals, 0.0)
    side = np.where(np.isfinite(side), side, 0.0)
    reduced = program.cost - y @ program.matrix
    least = np.minimum(reduced * program.lower, reduced * program.upper)
    size = np.maximum(np.abs(program.lower), np.abs(program.upper))
    total = np.abs(y * side).sum() + (np.abs(program.cost) + np.abs(y) @ abs(program.matrix)) @ size
    rounding = (len(y) + len(size) + 4) * np.finfo(np.float64).eps * total
    return float((y * side).sum() + least.sum() - rounding)


def choose(solver: Solver, *, linear: bool = False) -> str:
    """The solver that is meant; UserError for one that does not exist or is not installed."""
    if solver not in get_args(Solver):
        raise unknown("solver", solver, get_args(Solver))
    order = [solver] if solver != "auto" else ["highs", "scip", "gurobi"] if linear else ["scip", "highs", "gurobi"]
    for name in order:
        if find_spec(PACKAGES[name]) is not None:
            return name
    if solver == "auto":
        raise UserError("no solver is installed; 'pip install pyscipopt highspy' brings SCIP and HiGHS")
    raise UserError(f"the solver {solver!r} is not installed; 'pip install {PACKAGES[solver]}' brings it")


def _scip(program: Program, timeout: float, below: float, above: float, threads: int) -> _Answer:
    scip: Any = import_module("pyscipopt.scip")
    model = scip.Model()
    model.hideOutput()
    # Margins are decided by branching and propagation; cuts take the time of the root and give little.
    model.setSeparating(scip.PY_SCIP_PARAMSETTING.OFF)
    model.setParam("limits/time", timeout)
    if np.isfinite(below):
        model.setParam("limits/primal", below)
    if np.isfinite(above):
        model.setObjlimit(above)
    kinds = np.where(program.integral, "I", "C").tolist()
    columns = zip(program.lower.tolist(), program.upper.tolist(), program.cost.tolist(), kinds, strict=True)
    variables = [model.addVar(lb=low, ub=high, obj=cost, vtype=kind) for low, high, cost, kind in columns]
    if program.priorities is not None:
        for j in np.flatnonzero(program.integral).tolist():
            model.chgVarBranchPriority(variables[j], int(program.priorities[j]))
    matrix = program.matrix
    start, index, data = (part.tolist() for part in (matrix.indptr, matrix.indices, matrix.data))
    for i, (low, high) in enumerate(zip(program.row_lower.tolist(), program.row_upper.tolist(), strict=True)):
        entries = range(start[i], start[i + 1])
        row = scip.Expr({scip.Term(variables[index[k]]): data[k] for k in entries})
        model.addCons((low <= row) if high == np.inf else (row <= high) if low == -np.inf else (low <= (row <= high)))
    model.optimizeNogil()
    status = model.getStatus()
    if status == "userinterrupt":
        raise KeyboardInterrupt
    x = None
    if model.getNSols():
        best = model.getBestSol()
        x = np.array([model.getSolVal(best, variable) for variable in variables])
    dual = np.inf if status == "infeasible" else model.getDualbound()
    return _Answer(float(dual), x, status in ("optimal", "infeasible"))


def _highs(program: Program, timeout: float, below: float, above: float, threads: int) -> _Answer:
    highspy: Any = import_module("highspy")
    mixed = bool(program.integral.any())
    highs = highspy.Highs()
    highs.silent()
    options: dict[str, Any] = {"time_limit": timeout, "threads": threads, "mip_rel_gap": 0.0}
    if mixed and np.isfinite(below):
        options["objective_target"] = below
    if mixed and np.isfinite(above):
        options["objective_bound"] = above
    for key, value in options.items():
        highs.setOptionValue(key, value)
    lp = highspy.HighsLp()
    lp.num_row_, lp.num_col_ = program.matrix.shape
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = program.cost, program.lower, program.upper
    lp.row_lower_, lp.row_upper_ = program.row_lower, program.row_upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = program.matrix.indptr
    lp.a_matrix_.index_ = program.matrix.indices
    lp.a_matrix_.value_ = program.matrix.data
    if mixed:
        kinds = highspy.HighsVarType
        lp.integrality_ = [kinds.kInteger if whole else kinds.kContinuous for whole in program.integral]
    highs.passModel(lp)
    # In a thread of its own, so that Ctrl-C is heard; highspy's own handling of it prints.
    highs.HandleUserInterrupt = True
    highs.startSolve()
    try:
        while not highs.wait(0.1)[0]:
            pass
    except KeyboardInterrupt:
        highs.cancelSolve()
        highs.wait()
        raise
    status, info, found = highs.getModelStatus(), highs.getInfo(), highs.getSolution()
    solved = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    x = np.array(found.col_value) if solved else None
    statuses = highspy.HighsModelStatus
    infeasible = status == statuses.kInfeasible
    if infeasible:
        dual = np.inf
    elif mixed:
        dual = info.mip_dual_bound
    else:
        dual = safe_bound(program, np.array(found.row_dual) if found.dual_valid else np.zeros(len(program.row_lower)))
    return _Answer(float(dual), None if infeasible else x, infeasible or status == statuses.kOptimal)


def _gurobi(program: Program, timeout: float, below: float, above: float, threads: int) -> _Answer:
    gurobipy: Any = import_module("gurobipy")
    grb = gurobipy.GRB
    with gurobipy.Env(params={"OutputFlag": 0}) as environment, gurobipy.Model(env=environment) as model:
        parameters = {"TimeLimit": timeout, "Threads": threads, "MIPGap": 0.0, "FeasibilityTol": 1e-6}
        if np.isfinite(below):
            parameters["BestObjStop"] = below
        if np.isfinite(above):
            parameters["BestBdStop"] = above
        for key, value in parameters.items():
            model.setParam(key, value)
        kinds = np.where(program.integral, grb.INTEGER, grb.CONTINUOUS)
        x = model.addMVar(len(program.cost), lb=program.lower, ub=program.upper, obj=program.cost, vtype=kinds)
        if program.priorities is not None:
            x.BranchPriority = program.priorities
        for side, sense in ((program.row_lower, ">"), (program.row_upper, "<")):
            there = np.flatnonzero(np.isfinite(side))
            model.addMConstr(program.matrix[there], x, sense, side[there])
        model.optimize()
        if model.Status == grb.INTERRUPTED:
            raise KeyboardInterrupt
        if model.Status == grb.INFEASIBLE:
            return _Answer(np.inf, None, True)
        best = np.array(x.X) if model.SolCount else None
        return _Answer(float(model.ObjBound), best, model.Status == grb.OPTIMAL)

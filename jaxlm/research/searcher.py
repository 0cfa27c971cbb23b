"""A search by Optuna: a config file's `suggest` says what may vary, each trial is an arm of a sweep. Optional: jaxlm[search].

    def suggest(trial):
        return {"optimizer.learning_rate": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}

WORKDIR/optuna.log keeps the study: the same command again goes on, and more --trials add to it.
"""

import pathlib

from jaxlm.config import call, module_of
from jaxlm.errors import UserError
from jaxlm.research.board import Board
from jaxlm.research.modes import MODES, Options
from jaxlm.research.sweep import Arm, Sweep, mean_losses, name_of, runs_of


def search(spec: str, overrides: list[str], workdir: str, trials: int, seeds: int, mode: str, options: Options) -> Sweep:
    """Makes trials until the study has `trials`, each with the same `seeds` seeds -> all of them as a sweep, the best first.

    Lowest mean final validation loss is sought. A trial that fails or diverges is told as such.
    """
    path = spec.partition(":")[0]
    suggest = getattr(module_of(path), "suggest", None)
    if suggest is None:
        raise UserError(f"{path}: has no suggest(trial); write one beside get_config (docs/research.md), or leave --trials out")
    if mode not in ("serial", "processes"):
        raise UserError(f"--mode={mode}: a search learns from each trial; use serial or processes")
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise UserError("--trials: needs Optuna; pip install 'jaxlm[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    states = optuna.trial.TrialState
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "optuna.log"))), study_name="jaxlm", direction="minimize",
        load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # the same search twice; another one when it goes on
    for trial in study.get_trials(states=(states.RUNNING,)):  # stopped in the middle: the same once more, whose runs go on
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=states.FAIL)
    done = lambda: study.get_trials(states=(states.COMPLETE,))
    while len(done()) < trials:
        trial = study.ask()
        chosen = call(path, suggest, trial)
        name = name_of(chosen)
        trial.set_user_attr("arm", name)
        trial.set_user_attr("overrides", chosen)
        arm = Arm(name, chosen, list(range(seeds or 1)), None)
        sweep = Sweep(spec, list(overrides), folder, [arm], runs_of(spec, overrides, folder, [arm]))
        with Board(sweep) as board:
            MODES[mode](sweep, board, options)
        loss = mean_losses(sweep.runs)[name]  # infinite where no run ended
        study.tell(trial, loss)
        best = study.best_trial
        print(f"trial {len(done())}/{trials}: {name}: {loss:.4f}; best so far {best.user_attrs['arm']}: {best.value:.4f}",
              flush=True)
    best_first = sorted(done(), key=lambda trial: trial.value)
    ranked = {trial.user_attrs["arm"]: trial.user_attrs["overrides"] for trial in best_first}
    arms = [Arm(name, chosen, list(range(seeds or 1)), None) for name, chosen in ranked.items()]
    return Sweep(spec, list(overrides), folder, arms, runs_of(spec, overrides, folder, arms))

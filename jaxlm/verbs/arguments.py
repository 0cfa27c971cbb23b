"""Arguments that several verbs have."""


def add_config(verb):
    verb.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a config file, such as configs/shakespeare.py")


def add_model(verb):
    verb.add_argument("--workdir", default="", metavar="DIR", help="the run directory; without it give "
                      "--config.model.from_pretrained=DIR, a run or Hugging Face weights (folder or org/name)")


def add_workdir(verb):
    verb.add_argument("--workdir", required=True, metavar="DIR", help="the run directory")


def add_checkpoint(verb):
    verb.add_argument("--checkpoint", default="", metavar="WHICH", help="of the run: best (by eval.metric), latest, or a step; "
                      "default: best where the run keeps it (checkpoint.keep_best, eval.patience), else latest")

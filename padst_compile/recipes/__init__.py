"""Training recipes: image classification and language modelling from files, resumable; what `padst train` runs.

from padst_compile.recipes import TrainConfig, load_trained, run
result = run(TrainConfig(model="hf:gpt2,n_layer=4", data="input.txt", sparsity=spec, dst=dst), "runs/gpt")
"""

from padst_compile.recipes.config import TrainConfig
from padst_compile.recipes.result import Result
from padst_compile.recipes.run import run
from padst_compile.recipes.trained import load_trained

__all__ = ["Result", "TrainConfig", "load_trained", "run"]

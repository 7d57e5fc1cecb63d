"""Where the kernels run: on the GPU if there is one, else on Triton's interpreter.

The interpreter is chosen when triton is imported, so this must come first. It changes nothing for
the engine's other tests in this process: on CPU tensors every public function takes the torch twin.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

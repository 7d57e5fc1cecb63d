"""One kernel a file: the public function, the Triton kernel, and its naive torch twin.

The public function runs the Triton kernel on CUDA tensors and the twin on CPU tensors; the twin is
also what the tests compare the kernel with. No function here waits for the device, and none has a
launch grid that depends on what a device tensor holds, so all of them can be captured in a CUDA
graph.
"""

"""The router: radix tree, KV slots, queue and policy. Plain Python and NumPy, no torch, no GPU.

Read in this order: slots, radix_cache, request, policy, scheduler, router.
"""

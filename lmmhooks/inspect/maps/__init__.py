"""
Maps of where a model looks, or what of an image its answer depends on; one module per kind, mathematics as functions.

`lmmhooks.inspect.attention_map` runs them. Nothing here changes what the model computes.
"""

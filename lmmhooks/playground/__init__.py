"""
The playground: one image, one question, the model as it is beside the model under methods, in a page of one's own.

Everything that can be decided without a user interface is in `choices`, `session` and `rendering`; `app` lays the page
out with gradio, and `server` puts it on this machine's loopback address and nowhere else.
"""

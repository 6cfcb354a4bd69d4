"""The server of a folder of graphs, behind `jaxclt serve`.

`folder` says what is handed out, `save` what is taken, `app` at which addresses, `door`
to whom, and `listen` runs it all on uvicorn. Only that command imports them.
"""

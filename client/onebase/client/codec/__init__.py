"""Requests out of Python values and Python values out of responses: pure, knowing nothing of how calls are made.

One module per file of the contract. Each holds its service's methods (`Rpc`), a function per method that builds the
`Call`, and the functions that read the answers; `values` holds what they share. A synchronous and an asynchronous
client send the same calls.
"""

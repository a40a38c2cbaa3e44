"""The last sight of protobuf: requests are checked here and become jobs; results become responses.

Whatever a request says is checked before any work begins, and refused with the path of the field, its value and
the way out. No module outside this package and `services` reads or writes a message.
"""

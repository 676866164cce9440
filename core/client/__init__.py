"""The engine client with its two transports, to an engine process and to one in this process; knows no HTTP."""

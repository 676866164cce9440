"""The HTTP server in the front process; reaches the engine through ``core.client``, never touches the device."""

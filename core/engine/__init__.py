"""The engine: schedules requests and runs forward passes; the only owner of the device, reached by messages only."""

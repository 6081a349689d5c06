"""The laws as a test suite without a test file: `pytest --pyargs effattn.suite --effattn-method METHOD`."""

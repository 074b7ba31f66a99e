"""What tests of several modules share and that is no fixture: `from helpers.commands import WORKING`.

Fixtures stand in conftest.py. No test imports from another test.
"""

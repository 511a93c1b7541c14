"""One browser for all browser tests of a process: Playwright's synchronous interface cannot be entered twice."""
from browser import chromium  # noqa: F401

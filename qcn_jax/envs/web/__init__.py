"""Pages and components in a real browser: their tests, what runs them in a sandbox, and what is seen of them.

A repository with files of page tests (page_tests.py) is tested in Chromium, which runs in the sandbox beside the page,
without a network; whoever calls `Sandbox.run_tests` gets outcomes by test id as of any other repository. Playwright
drives the browser from a process of its own (inside/driver.mjs). The page's code has no way to what it says: results
leave by a pipe that only the driver has, elements are found and measured in a world of scripts that the page does not
share, and what can be seen is read from pixels.
"""

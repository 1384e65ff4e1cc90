"""The bus on PythonAnywhere: the WSGI file of a web app there. A free account is enough.

1. Upload intentbus.py to /home/YOU/intentbus/ (tab Files).
2. Tab Web: add a new web app, "Manual configuration", Python 3.9 or newer. Switch "Force HTTPS" on.
3. Click the link "WSGI configuration file", replace all that is in it by this file, save, and click "Reload".
4. Open https://YOU.pythonanywhere.com/health. The first request has made the owner key: in a Bash console, cat ~/.apikey

On your own machines: the key into ~/.apikey, and INTENT_BUS_URL=https://YOU.pythonanywhere.com. A free account answers one
request at a time, so this bus holds none: workers ask again every few seconds (work --poll). One worker process only.
"""

import os
import sys

HOME = os.path.expanduser("~")
sys.path.insert(0, os.path.join(HOME, "intentbus"))                          # where intentbus.py is
os.environ.setdefault("BUS_DB_PATH", os.path.join(HOME, "intentbus.db"))     # where the intents are
os.environ.setdefault("BUS_TRUST_PROXY", "1")                                # the client's address is what the site's proxy says

from intentbus import application     # noqa: E402, F401, it is what the site calls

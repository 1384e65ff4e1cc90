"""The bus on PythonAnywhere: the WSGI file of a web app there. A free account is enough.

1. Upload intentbus.py to /home/YOU/intentbus/ (tab Files).
2. Tab Web: add a new web app, "Manual configuration", Python 3.9 or newer. Switch "Force HTTPS" on.
3. Click the link "WSGI configuration file", replace its content by this file, save, and click "Reload".
4. Open https://YOU.pythonanywhere.com/health. This first request creates the owner key: in a Bash console, cat ~/.apikey

The owner key stays there. For each of your machines, add a key at https://YOU.pythonanywhere.com/admin/dashboard (user admin,
password the owner key). On that machine, put it into ~/.apikey (mode 600), and set INTENT_BUS_URL=https://YOU.pythonanywhere.com.
A free account answers one request at a time, so claims cannot wait there: workers ask again every few seconds (work --poll).
Use one worker process only.
"""

import os
import sys

HOME = os.path.expanduser("~")
sys.path.insert(0, os.path.join(HOME, "intentbus"))                          # where intentbus.py is
os.environ.setdefault("BUS_DB_PATH", os.path.join(HOME, "intentbus.db"))     # where the intents are
os.environ.setdefault("BUS_TRUST_PROXY", "1")                                # the proxy of the site knows the client's address

from intentbus import application     # noqa: E402, F401, the site calls it

# The committed results that the page is about.
import shutil

from tests.documents.blocks import ROOT

shutil.copy(ROOT / "bench" / "results" / "real-5" / "results.json", "results.json")

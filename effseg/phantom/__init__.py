"""CT-like torso phantoms: HU volumes with label maps, for demonstrations and tests without patients.

Every phantom is another body: organs, body wall, bowel and arms are drawn with random size, place and tilt,
the whole body is shifted, scaled and smoothly deformed; contrast phase, texture, bias and noise vary.
Organs come in pairs that look alike and are told apart by position only: right and left kidney, right and
left adrenal gland, aorta and inferior vena cava, liver and spleen share HU, texture and shape prior. Bowel
loops with the kidneys' or the liver's HU carry no label. So a network must see the whole body.

Axes are RAS+: the first index grows to the patient's right, the second to anterior, the third to superior.
Body units: the torso is about 1.7 wide, 1.15 deep and 1.5 long; one unit is `MM_PER_UNIT` mm.
"""

from effseg.phantom.body import generate
from effseg.phantom.dataset import write_dataset
from effseg.phantom.organs import NAMES
from effseg.phantom.torso import spacing

__all__ = ["NAMES", "generate", "spacing", "write_dataset"]

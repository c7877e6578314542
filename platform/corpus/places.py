"""Names of places in the brain by MNI coordinates."""

from __future__ import annotations


def region_of(x_mm: float, y_mm: float, z_mm: float) -> str:
    """Lobe or deep structure around a point, by planes along the large fissures of MNI space.

    Basal ganglia and thalamus are boxes beside the third ventricle. The tentorium lies at z = -9 mm near the midline
    and falls from -12 to -20 mm beside it. The Sylvian fissure climbs from -2 mm at y = 0 by 0.6 mm a millimetre
    backwards, up to 20 mm; the temporal pole ends at y = 24. The central sulcus runs from (-8, 20) to (-28, 70) in
    (y, z), the front of the occipital lobe from (-60, 0) to (-72, 40). Coarse, but the same rule for every patient; a
    test holds it against places named by Dosenbach et al. (Science 2010).

    Returns:
        `basal ganglia`, `thalamus`, `brainstem`, `cerebellum`, or a lobe.
    """
    lateral = abs(x_mm)
    if lateral < 14 and -48 < y_mm < -10 and z_mm < -8:
        return "brainstem"
    if y_mm < -30 and z_mm < (-9 if lateral < 15 and y_mm < -45 else -14 + 0.12 * (y_mm + 45)):
        return "cerebellum"
    if 3 < lateral < 36 and -10 <= y_mm < 22 and -12 < z_mm < 22:
        return "basal ganglia"
    if lateral < 26 and -34 < y_mm < -4 and -4 < z_mm < 20:
        return "thalamus"
    if y_mm < -60 - 0.3 * max(z_mm, 0.0):
        return "occipital lobe"
    if lateral > 20 and y_mm < 24 and z_mm < min(-2 - 0.6 * y_mm, 20.0):
        return "temporal lobe"
    return "parietal lobe" if y_mm < -8 - 0.4 * (z_mm - 20) else "frontal lobe"

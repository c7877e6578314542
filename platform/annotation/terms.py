"""The controlled vocabulary of level 2: which structures may be named in an image of a body part.

Terms follow the headings of radiology reports (RSNA RadReport templates) in the words of `platform.language.words`.
"""

from __future__ import annotations

from collections.abc import Mapping

BONES, JOINTS, SOFT, ORGANS, VESSELS, SPACES = (
    "bony_structures", "articular_structures", "soft_tissues_and_musculature", "organs_or_central_structures",
    "neurovascular_or_connective_structures", "spaces_or_cavities_or_joint_compartments",
)  # fmt: skip

_VERTEBRAL = {
    BONES: ("vertebral bodies", "posterior elements", "sacrum", "coccyx", "skull base"),
    JOINTS: ("intervertebral discs", "facet joints", "sacroiliac joints", "atlantoaxial joint"),
    SOFT: ("paraspinal muscles", "psoas muscles", "subcutaneous fat"),
    ORGANS: ("spinal cord", "conus medullaris", "cauda equina", "cerebellar tonsils"),
    VESSELS: ("nerve roots", "ligamenta flava", "longitudinal ligaments", "aorta", "vertebral arteries"),
    SPACES: ("spinal canal", "neural foramina", "epidural fat", "thecal sac"),
}
_UPPER_ABDOMEN = {
    BONES: ("vertebral bodies", "ribs"),
    JOINTS: (),
    SOFT: ("abdominal wall muscles", "paraspinal muscles", "psoas muscles", "subcutaneous fat", "visceral fat"),
    ORGANS: (
        "liver", "spleen", "kidneys", "pancreas", "gallbladder", "adrenal glands", "stomach", "duodenum", "small bowel",
        "colon",
    ),
    VESSELS: ("aorta", "inferior vena cava", "portal vein", "hepatic veins", "splenic vein", "renal vessels"),
    SPACES: ("bile ducts", "peritoneal cavity", "pleural spaces", "renal pelvis"),
}  # fmt: skip
_PELVIC = {
    BONES: ("iliac bones", "pubic bones", "ischium", "sacrum", "femoral heads", "femoral necks", "coccyx"),
    JOINTS: ("hip joints", "sacroiliac joints", "pubic symphysis"),
    SOFT: ("gluteal muscles", "obturator muscles", "levator ani", "iliopsoas muscles", "subcutaneous fat"),
    ORGANS: ("bladder", "rectum", "sigmoid colon", "uterus", "ovaries", "prostate", "seminal vesicles", "vagina"),
    VESSELS: ("iliac vessels", "lymph nodes", "neurovascular bundles", "sciatic nerves"),
    SPACES: ("peritoneal cavity", "pouch of Douglas", "mesorectal fat", "ischioanal fossa"),
}

TERMS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "brain": {
        BONES: ("skull", "skull base", "upper cervical vertebrae", "mandible"),
        JOINTS: ("temporomandibular joints",),
        SOFT: ("scalp", "face", "muscles of mastication", "orbital fat"),
        ORGANS: (
            "cerebral hemispheres", "grey matter", "white matter", "basal ganglia", "thalami", "hippocampi",
            "corpus callosum", "brainstem", "cerebellum", "pituitary gland", "eyes", "upper spinal cord",
        ),
        VESSELS: ("circle of Willis", "internal carotid arteries", "venous sinuses", "optic nerves", "meninges"),
        SPACES: (
            "lateral ventricles", "third ventricle", "fourth ventricle", "cisterns", "sulci", "paranasal sinuses",
            "mastoid air cells",
        ),
    },
    "spine": _VERTEBRAL,
    "breast": {
        BONES: ("ribs", "sternum"),
        JOINTS: (),
        SOFT: ("fibroglandular tissue", "fatty tissue", "pectoral muscles", "skin", "nipple"),
        ORGANS: ("left breast", "right breast", "heart", "lungs", "liver"),
        VESSELS: ("axillary lymph nodes", "internal mammary vessels", "Cooper ligaments"),
        SPACES: ("axilla", "pleural spaces"),
    },
    "knee": {
        BONES: ("distal femur", "proximal tibia", "patella", "proximal fibula"),
        JOINTS: (
            "medial meniscus", "lateral meniscus", "femoral cartilage", "tibial cartilage", "patellar cartilage",
        ),
        SOFT: ("quadriceps muscle", "gastrocnemius muscle", "infrapatellar fat pad", "subcutaneous fat"),
        ORGANS: (),
        VESSELS: (
            "anterior cruciate ligament", "posterior cruciate ligament", "medial collateral ligament",
            "lateral collateral ligament", "patellar tendon", "quadriceps tendon", "popliteal vessels",
        ),
        SPACES: ("joint space", "suprapatellar recess", "popliteal fossa", "medial compartment", "lateral compartment",
                 "patellofemoral compartment"),
    },
    "prostate": _PELVIC | {
        ORGANS: (
            "prostate", "peripheral zone", "transition zone", "central zone", "seminal vesicles", "bladder", "rectum",
            "urethra",
        ),
        SPACES: ("periprostatic fat", "mesorectal fat", "ischioanal fossa"),
    },
    "heart": {
        BONES: ("sternum", "ribs", "vertebral bodies"),
        JOINTS: (),
        SOFT: ("chest wall muscles", "epicardial fat", "subcutaneous fat"),
        ORGANS: (
            "left ventricular myocardium", "right ventricular wall", "interventricular septum", "papillary muscles",
            "pericardium", "liver", "lungs",
        ),
        VESSELS: ("aorta", "pulmonary artery", "superior vena cava", "inferior vena cava", "pulmonary veins"),
        SPACES: (
            "left ventricular cavity", "right ventricular cavity", "left atrium", "right atrium", "pericardial space",
            "pleural spaces",
        ),
    },
    "liver": _UPPER_ABDOMEN,
    "abdomen": _UPPER_ABDOMEN,
    "pelvis": _PELVIC,
    "hip": _PELVIC | {
        JOINTS: ("hip joint", "acetabular labrum", "femoral head cartilage", "sacroiliac joints", "pubic symphysis"),
        SPACES: ("joint space", "iliopsoas bursa", "trochanteric bursa"),
    },
    "shoulder": {
        BONES: ("humeral head", "glenoid", "acromion", "clavicle", "coracoid process", "scapula"),
        JOINTS: ("glenohumeral joint", "acromioclavicular joint", "labrum", "articular cartilage"),
        SOFT: (
            "supraspinatus muscle", "infraspinatus muscle", "subscapularis muscle", "teres minor muscle",
            "deltoid muscle", "subcutaneous fat",
        ),
        ORGANS: (),
        VESSELS: ("supraspinatus tendon", "biceps tendon", "glenohumeral ligaments", "axillary vessels"),
        SPACES: ("joint space", "subacromial bursa", "axillary recess"),
    },
    "ankle": {
        BONES: ("distal tibia", "distal fibula", "talus", "calcaneus", "navicular", "cuboid", "metatarsals"),
        JOINTS: ("tibiotalar joint", "subtalar joint", "talonavicular joint", "articular cartilage"),
        SOFT: ("calf muscles", "plantar muscles", "heel fat pad", "subcutaneous fat"),
        ORGANS: (),
        VESSELS: ("Achilles tendon", "peroneal tendons", "tibialis posterior tendon", "deltoid ligament",
                  "anterior talofibular ligament", "plantar fascia"),
        SPACES: ("joint space", "sinus tarsi", "tarsal tunnel", "retrocalcaneal bursa"),
    },
    "wrist": {
        BONES: ("distal radius", "distal ulna", "scaphoid", "lunate", "triquetrum", "capitate", "metacarpals"),
        JOINTS: ("radiocarpal joint", "distal radioulnar joint", "midcarpal joint", "articular cartilage"),
        SOFT: ("thenar muscles", "hypothenar muscles", "subcutaneous fat"),
        ORGANS: (),
        VESSELS: ("triangular fibrocartilage complex", "scapholunate ligament", "flexor tendons", "extensor tendons",
                  "median nerve"),
        SPACES: ("joint space", "carpal tunnel"),
    },
    "neck": {
        BONES: ("cervical vertebrae", "mandible", "hyoid bone", "skull base", "clavicles"),
        JOINTS: ("temporomandibular joints", "facet joints"),
        SOFT: ("sternocleidomastoid muscles", "tongue", "strap muscles", "subcutaneous fat"),
        ORGANS: ("thyroid gland", "parotid glands", "submandibular glands", "larynx", "pharynx", "oesophagus",
                 "spinal cord", "brainstem", "cerebellum"),
        VESSELS: ("carotid arteries", "jugular veins", "vertebral arteries", "lymph nodes", "brachial plexus"),
        SPACES: ("airway", "parapharyngeal spaces", "paranasal sinuses"),
    },
    "chest": {
        BONES: ("sternum", "ribs", "vertebral bodies", "clavicles", "scapulae"),
        JOINTS: ("sternoclavicular joints",),
        SOFT: ("chest wall muscles", "pectoral muscles", "subcutaneous fat", "breast tissue"),
        ORGANS: ("lungs", "heart", "thymus", "oesophagus", "trachea", "thyroid gland", "liver", "spleen"),
        VESSELS: ("aorta", "pulmonary arteries", "superior vena cava", "lymph nodes"),
        SPACES: ("pleural spaces", "mediastinum", "pericardial space"),
    },
}  # fmt: skip
"""Body part, as the column of that name has it, to key of level 2 to terms; an empty tuple: nothing of that kind is
there."""


def terms_for(body_part: str | None) -> Mapping[str, tuple[str, ...]]:
    """The terms of a body part by key of level 2; empty where the part is not known, and any words may be used."""
    return TERMS.get(body_part or "", {})

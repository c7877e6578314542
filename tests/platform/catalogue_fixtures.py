"""A tiny copy of every catalogued data set, in its own layout, and what must be read from it.

Adding a set means adding its row to the catalogue and a fixture here: the files by their paths as the authors lay them
out (not as our pattern says), each image with the contrast that it must get::

    "my-set": Fixture(
        images={"7/T1.nii.gz": "T1w", "7/T2.nii.gz": "T2w"},
        labels={"7/cartilage.nii.gz": (1, 2)},
        patients={"7"},
        names={"femoral cartilage", "tibial cartilage"},
    )
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from tests.platform.catalogue_writers import (
    SHAPE,
    Writer,
    dicom_writer,
    fastmri_writer,
    four_d_writer,
    image_of,
    label_array,
    large_fastmri_writer,
    npz_writer,
    phantom,
    save_calgary,
    save_matlab,
    save_prostate,
    save_skm_tea,
    save_volume,
    volume_writer,
    zip_writer,
)
from tests.platform.intake_fakes import coil_kspace, oblique_affine, save_ismrmrd, save_nifti


@dataclass(frozen=True)
class Fixture:
    """Files of one data set and what must come of them."""

    images: Mapping[str, str | None]
    """Path of every volume file to the contrast that its volumes get."""
    labels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Path of every label map to the values in it."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Path of every table to its content."""
    writers: Mapping[str, Writer] = field(default_factory=dict)
    """Who writes files that are not written by their suffix."""
    patients: frozenset[str] | set[str] = frozenset()
    """Patient keys of all volumes; empty where the header names them."""
    names: frozenset[str] | set[str] = frozenset()
    """Meanings of labels that rows carry."""
    unnamed_labels: bool = False
    """Label maps are read although the meaning of their values is not known."""
    classes: frozenset[str] | set[str] | None = None
    """Of all volumes; None: not annotated."""
    num_volumes: int | None = None
    """Where it is not the number of image files."""
    boxes: tuple[tuple[int, ...], ...] | None = None
    report: str | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    """Facts that every volume carries."""
    left_out: int = 0
    """Lines of the ledger: files of the layout that are not read."""
    extra: Mapping[str, Writer] = field(default_factory=dict)
    """Files that belong to the layout and give no volume."""


def write_fixture(fixture: Fixture, root: Path) -> Path:
    """Write a data set below a folder."""
    for path in fixture.images:
        _writer(fixture, path)(_made(root / path))
    for path, values in fixture.labels.items():
        save_volume(_made(root / path), label_array(values))
    for path, text in fixture.texts.items():
        _made(root / path).write_text(text, encoding="utf-8")
    for path, write in fixture.extra.items():
        write(_made(root / path))
    return root


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _writer(fixture: Fixture, path: str) -> Writer:
    return fixture.writers.get(path, lambda target: save_volume(target, image_of(path)))


# ---- The data sets


def _card(labels: Mapping[str, object], channels: Mapping[str, str], *, key: str = "channel_names") -> str:
    return json.dumps({"name": "a name of its own", key: channels, "labels": labels})


def _brats(
    folder: str, case: str, contrasts: Mapping[str, str], *, join: str, values: tuple[int, ...], **more: object
) -> Fixture:
    stem = f"{folder}/{case}/{case}{join}"
    return Fixture(
        images={f"{stem}{word}.nii.gz": name for word, name in contrasts.items()},
        labels={f"{stem}seg.nii.gz": values},
        **{"names": {"tumour region"}, **more},  # type: ignore[arg-type]
    )


_OLD = {"flair": "FLAIR", "t1": "T1w", "t1ce": "T1w", "t2": "T2w"}
_NEW = {"t1n": "T1w", "t1c": "T1w", "t2w": "T2w", "t2f": "FLAIR"}
_NUMBERED = {"tumour label 1", "tumour label 2", "tumour label 4"}


def _brats_2023(kind: str) -> Fixture:
    folder = f"ASNR-MICCAI-BraTS2023-{kind}-Challenge-TrainingData"
    return _brats(folder, f"BraTS-{kind}-00004-000", _NEW, join="-", values=(1, 2, 3), patients={f"BraTS-{kind}-00004"})


def _tcga(collection: str) -> Fixture:
    stem = f"Pre-operative_TCGA_{collection}_NIfTI_and_Segmentations/TCGA-02-0006/TCGA-02-0006_1996.08.23_"
    words = {"flair": "FLAIR", "t1": "T1w", "t1Gd": "T1w", "t2": "T2w"}
    return Fixture(
        images={f"{stem}{word}.nii.gz": name for word, name in words.items()},
        labels={f"{stem}GlistrBoost.nii.gz": (1, 2, 4)},
        patients={"TCGA-02-0006"},
        names={"tumour region"},
    )


def _tcia(name: str, folder: str = "") -> Fixture:
    path = f"{folder or name}-001/1.2.3/1.2.3.4/1-001.dcm"
    seed = zlib.crc32(name.encode())
    return Fixture(
        images={path: "T1w"},
        writers={path: dicom_writer(f"{name}-001", seed, "1-{n:03d}.dcm")},
        patients={f"{name}-001"},
    )


def _nnunet(
    root: str, case: str, contrast: str | None, *, channel: bool = True, card: str = "dataset.json", word: str = "MRI",
    labels: str = "labelsTr", images: str = "imagesTr",
) -> Fixture:  # fmt: skip
    return Fixture(
        images={f"{root}{images}/{case}{'_0000' if channel else ''}.nii.gz": contrast},
        labels={f"{root}{labels}/{case}.nii.gz": (1, 2)},
        texts={f"{root}{card}": _card({"background": 0, "first organ": 1, "second organ": 2}, {"0": word})},
        patients={case},
        names={"first organ", "second organ"},
    )


def _msd(task: str, case: str, channels: Mapping[str, str], contrasts: tuple[str | None, ...]) -> Fixture:
    path = f"{task}/imagesTr/{case}.nii.gz"
    return Fixture(
        images={path: contrasts[0]} if len(contrasts) == 1 else {path: "+".join(str(c) for c in contrasts)},
        writers={path: four_d_writer(path, len(contrasts))} if len(contrasts) > 1 else {},
        labels={f"{task}/labelsTr/{case}.nii.gz": (1, 2)},
        texts={f"{task}/dataset.json": _card({"0": "background", "1": "one", "2": "two"}, channels, key="modality")},
        num_volumes=len(contrasts),
        patients={case},
        names={"one", "two"},
    )


def _fastmri_plus(part: str, path: str, *, header: str = "file,slice,study_level,x,y,width,height,label") -> Fixture:
    file = PurePosixPath(path).stem
    rows = [
        header,
        f"{file},2,No,10,20,30,40,a finding",
        f"{file},0,Yes,,,,,of the study",
        "other,1,No,1,1,1,1,elsewhere",
    ]
    # Rows count from below in 320 x 320; the image has 330 rows and 324 columns.
    return Fixture(
        images={path: None},
        writers={path: large_fastmri_writer(path)},
        texts={f"Annotations/{part}.csv": "\n".join(rows)},
        boxes=((2, 320 - 60 + 5, 12, 3, 320 - 20 + 5, 42),),
        classes={"of the study"},
        patients={f"id-{path}"},
    )


def _kspace(
    path: str, write: Writer, contrast: str | None, patients: set[str], num_volumes: int = 1, **more: object
) -> Fixture:
    return Fixture(
        images={path: contrast},
        writers={path: write},
        patients=patients,
        num_volumes=num_volumes,
        **more,  # type: ignore[arg-type]
    )


def _in(folder: str, words: Mapping[str, str | None], suffix: str = ".nii.gz") -> dict[str, str | None]:
    return {f"{folder}{word}{suffix}": contrast for word, contrast in words.items()}


def _mms_table() -> str:
    return "External code,VendorName,Vendor,Centre,ED,ES,Age,Sex,Pathology\nA0S9V9,Siemens,A,1,0,2,51,F,DCM\n"


_KSPACE = {
    "fastmri-knee": _kspace(
        "multicoil_train/file1000001.h5",
        fastmri_writer("k", "CORPDFS_FBK"),
        "PD",
        {"id-k"},
        facts={"body_part": "knee"},
    ),
    "fastmri-brain": _kspace(
        "multicoil_val/file_brain_AXT1POST_200_6002717.h5", fastmri_writer("b", "AXT1POST"), "T1w", {"id-b"}
    ),
    "fastmri-plus-knee": _fastmri_plus("knee", "multicoil_train/file1000002.h5"),
    "fastmri-plus-brain": _fastmri_plus("brain", "multicoil_train/file_brain_AXT2_200_2000001.h5"),
    "fastmri-prostate": _kspace(
        "training_T2_1/file_prostate_AXT2_001.h5", lambda p: save_prostate(p, image_of("prostate")), "T2w", {"001"}
    ),
    "skm-tea": _kspace(
        "files_recon_calib-24/MTR_001.h5", lambda p: save_skm_tea(p, image_of("tea", (2, *SHAPE))), None, {"MTR_001"}, 2
    ),
    "cc359-raw": _kspace(
        "Train/e14089s3_P53248.7.h5", lambda p: save_calgary(p, phantom(1), lines=8), "T1w", {"e14089s3"}
    ),
    "m4raw": _kspace(
        "multicoil_train/2022061003_T101.h5",
        fastmri_writer("m", "T1"),
        "T1w",
        {"2022061003"},
        facts={"field_strength_t": 0.3},
    ),
    "cmrxrecon2023": _kspace(
        "MultiCoil/Cine/TrainingSet/FullSample/P001/cine_sax.mat",
        lambda p: save_matlab(p, image_of("c23", (2, *SHAPE))),
        "cine",
        {"P001"},
        2,
    ),
    "cmrxrecon2024": _kspace(
        "MultiCoil/Aorta/TrainingSet/FullSample/P002/aorta_sag.mat",
        lambda p: save_matlab(p, image_of("c24", (2, *SHAPE))),
        None,
        {"P002"},
        2,
    ),
    "cmrxrecon2025": _kspace(
        "MultiCoil/LGE/TrainingSet/FullSample/Center001/UIH_30T_umr780/P003/lge.mat",
        lambda p: save_matlab(p, image_of("c25", (2, *SHAPE)), name="kspace"),
        None,
        {"Center001-UIH_30T_umr780-P003"},
        2,
    ),
    "ocmr": _kspace(
        "fs_0001_1_5T.h5",
        lambda p: save_ismrmrd(p, coil_kspace(image_of("ocmr")), oblique_affine()),
        "T2w",
        {"fs_0001"},
        facts={"field_strength_t": 1.5, "body_part": "heart"},
    ),
    "mridata-org": _kspace(
        "0a1b2c3d-0000-4000-8000-0123456789ab.h5",
        lambda p: save_ismrmrd(p, coil_kspace(image_of("org")), oblique_affine()),
        "T2w",
        {"0a1b2c3d-0000-4000-8000-0123456789ab"},
    ),
}

_BRATS = {
    "brats-2018": _brats(
        "MICCAI_BraTS_2018_Data_Training/HGG",
        "Brats18_2013_10_1",
        _OLD,
        join="_",
        values=(1, 2, 4),
        names=_NUMBERED,
        patients={"Brats18_2013_10_1"},
    ),
    "brats-2021": _brats(
        "RSNA_ASNR_MICCAI_BraTS2021_TrainingData",
        "BraTS2021_00003",
        _OLD,
        join="_",
        values=(1, 2, 4),
        names=_NUMBERED,
        patients={"BraTS2021_00003"},
    ),
    "brats-gli": _brats(
        "BraTS-GLI",
        "BraTS-GLI-00005-100",
        _NEW,
        join="-",
        values=(1, 2, 3, 4),
        patients={"BraTS-GLI-00005"},
        names={
            "non-enhancing tumour core",
            "surrounding non-enhancing FLAIR hyperintensity",
            "enhancing tumour",
            "resection cavity",
        },
    ),
    "brats-men": _brats_2023("MEN"),
    "brats-met": _brats_2023("MET"),
    "brats-ped": _brats_2023("PED"),
    "brats-ssa": _brats_2023("SSA"),
    "brats-tcga-gbm": _tcga("GBM"),
    "brats-tcga-lgg": _tcga("LGG"),
    "upenn-gbm": Fixture(
        images=_in(
            "images_structural/UPENN-GBM-00001_11/UPENN-GBM-00001_11_",
            {"T1": "T1w", "T1GD": "T1w", "T2": "T2w", "FLAIR": "FLAIR"},
        ),
        labels={"images_segm/UPENN-GBM-00001_11_segm.nii.gz": (1, 2, 4)},
        patients={"UPENN-GBM-00001"},
        names={"tumour region"},
    ),
}

_DICOM = {
    name: _tcia(name)
    for name in (
        "upenn-gbm-dicom",
        "remind",
        "vestibular-schwannoma-seg",
        "vestibular-schwannoma-mc-rc",
        "prostatex",
        "qin-prostate-repeatability",
        "prostate-mri-us-biopsy",
        "prostate-3t",
        "duke-breast-cancer-mri",
        "ispy1",
        "ispy2",
        "acrin-6698",
        "advanced-mri-breast-lesions",
        "acrin-contralateral-breast",
        "ea1141",
        "tcga-brca",
        "breast-mri-nact-pilot",
        "breast-diagnosis",
        "soft-tissue-sarcoma",
        "tcga-lihc",
        "tcga-kirc",
        "tcga-cesc",
        "cc-tumor-heterogeneity",
        "eay131",
        "aapm-rt-mac",
    )
} | {
    "dsb2015-cardiac": Fixture(
        images={"train/12/study/sax_7/IM-0001.dcm": "T1w"},
        patients={"12"},
        texts={"train.csv": "Id,Systole,Diastole\n12,60,120\n"},
        writers={"train/12/study/sax_7/IM-0001.dcm": dicom_writer("anonymous", 71, "IM-{n:04d}.dcm")},
    ),
    "mendeley-lumbar-spine": Fixture(
        images={"01_MRI_Data/0007/L-SPINE_1/T1_TSE_SAG_0003/IM1.ima": "T1w"},
        patients={"0007"},
        report="Disc bulge at L4/L5.",
        writers={"01_MRI_Data/0007/L-SPINE_1/T1_TSE_SAG_0003/IM1.ima": dicom_writer("anonymous", 72, "IM{n}.ima")},
        texts={"Radiologists Notes for Lumbar Spine MRI Dataset.csv": "ID,Notes\n7,Disc bulge at L4/L5.\n8,No.\n"},
    ),
    "dcm-qa-nih": Fixture(
        images={"In/20180918GE/mr_0004/1.dcm": "T1w"},
        patients={"nih"},
        left_out=1,
        extra=volume_writer("Ref/fmri.nii"),
        writers={"In/20180918GE/mr_0004/1.dcm": dicom_writer("nih", 73, "{n}.dcm")},
    ),
    "dcm-qa-sag": Fixture(
        images={"In/XA30/classic/2_fmri_SagAP/1.dcm": "T1w"},
        patients={"sag"},
        writers={"In/XA30/classic/2_fmri_SagAP/1.dcm": dicom_writer("sag", 74, "{n}.dcm")},
    ),
}

_ATLAS = "ATLAS_2/Training/R001/sub-r001s001/ses-1/anat/sub-r001s001_ses-1"
_DHCP = "rel3_dhcp_anat_pipeline/sub-CC00050XX01/ses-7201/anat/sub-CC00050XX01_ses-7201_"

_BRAIN = {
    "cc359-images": Fixture(
        images={"Original/CC0001_philips_15_55_M.nii.gz": "T1w"},
        patients={"CC0001"},
        facts={"vendor": "Philips", "field_strength_t": 1.5, "age_years": 55.0, "sex": "M"},
    ),
    "ucsf-pdgm": Fixture(
        images=_in(
            "UCSF-PDGM-v3/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_",
            {
                "T1": "T1w",
                "T1c": "T1w",
                "T2": "T2w",
                "FLAIR": "FLAIR",
                "SWI": "SWI",
                "DWI": "DWI",
                "ADC": "ADC",
                "ASL": "PWI",
            },
        ),
        labels={"UCSF-PDGM-v3/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_tumor_segmentation.nii.gz": (1, 2, 4)},
        extra=volume_writer("UCSF-PDGM-v3/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_brain_segmentation.nii.gz"),
        left_out=1,
        patients={"UCSF-PDGM-0004"},
        names={"tumour region"},
    ),
    "rhuh-gbm": Fixture(
        images=_in(
            "RHUH-0001/0/RHUH-0001_0_", {"t1": "T1w", "t1ce": "T1w", "t2": "T2w", "flair": "FLAIR", "adc": "ADC"}
        ),
        labels={"RHUH-0001/0/RHUH-0001_0_segmentations.nii.gz": (1, 2, 3)},
        patients={"RHUH-0001"},
        names={"tumour region"},
    ),
    "lumiere": Fixture(
        images=_in("Patient-001/week-000-1/", {"CT1": "T1w", "T1": "T1w", "T2": "T2w", "FLAIR": "FLAIR"}),
        patients={"Patient-001"},
    ),
    "msd-task01-brain-tumour": _msd(
        "Task01_BrainTumour",
        "BRATS_001",
        {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        ("FLAIR", "T1w", "T1w", "T2w"),
    ),
    "msd-task04-hippocampus": _msd("Task04_Hippocampus", "hippocampus_001", {"0": "MRI"}, (None,)),
    "yale-brain-mets": Fixture(
        images=_in("YG_0001/2010-01-02/YG_0001_", {"PRE": "T1w", "POST": "T1w", "T2": "T2w", "FLAIR": "FLAIR"}),
        patients={"YG_0001"},
    ),
    "crossmoda-2023": Fixture(
        images={
            "crossmoda23_training/TrainingSource/crossmoda2023_etz_1_ceT1.nii.gz": "T1w",
            "crossmoda23_training/TrainingTarget/crossmoda2023_etz_106_T2.nii.gz": "T2w",
        },
        labels={"crossmoda23_training/TrainingSource/crossmoda2023_etz_1_Label.nii.gz": (1, 2)},
        unnamed_labels=True,
        patients={"crossmoda2023_etz_1", "crossmoda2023_etz_106"},
    ),
    "isles-2022": Fixture(
        images={
            **_in(
                "ISLES-2022/sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_", {"adc": "ADC", "dwi": "DWI"}
            ),
            "ISLES-2022/sub-strokecase0001/ses-0001/anat/sub-strokecase0001_ses-0001_FLAIR.nii.gz": "FLAIR",
        },
        labels={"ISLES-2022/derivatives/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_msk.nii.gz": (1,)},
        texts={"ISLES-2022/participants.tsv": "participant_id\nsub-strokecase0001\n"},
        patients={"sub-strokecase0001"},
        names={"stroke lesion"},
    ),
    "atlas-v2": Fixture(
        images={f"{_ATLAS}_space-MNI152NLin2009aSym_T1w.nii.gz": "T1w"},
        labels={f"{_ATLAS}_space-MNI152NLin2009aSym_label-L_desc-T1lesion_mask.nii.gz": (1,)},
        patients={"sub-r001s001"},
        names={"chronic stroke lesion"},
    ),
    "feta": Fixture(
        images={"FeTA_2.1/sub-001/anat/sub-001_rec-mial_T2w.nii.gz": "T2w"},
        labels={"FeTA_2.1/sub-001/anat/sub-001_rec-mial_dseg.nii.gz": (1, 7)},
        unnamed_labels=True,
        patients={"sub-001"},
    ),
    "dhcp-neonatal": Fixture(
        images=_in(_DHCP, {"T1w": "T1w", "T2w": "T2w"}),
        labels={f"{_DHCP}desc-drawem87_dseg.nii.gz": (1, 87)},
        texts={
            "rel3_dhcp_anat_pipeline/participants.tsv": "participant_id\tsex\tbirth_age\nCC00050XX01\tFemale\t42.7\n"
        },
        unnamed_labels=True,
        patients={"sub-CC00050XX01"},
        facts={"sex": "F"},
    ),
    "openneuro": Fixture(
        images={
            "ds000001/sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz": "T1w",
            "ds000001/sub-02/anat/sub-02_acq-x_T2w.nii.gz": "T2w",
        },
        texts={"ds000001/participants.tsv": "participant_id\tage\tsex\nsub-01\t31\tM\nsub-02\t31\tM\n"},
        extra=volume_writer("ds000001/sub-01/ses-1/func/sub-01_ses-1_task-rest_bold.nii.gz"),
        left_out=1,
        patients={"sub-01", "sub-02"},
        facts={"age_years": 31.0, "sex": "M"},
    ),
    "aomic-id1000": Fixture(
        images={"ds003097/sub-0001/anat/sub-0001_run-1_T1w.nii.gz": "T1w"},
        texts={"ds003097/participants.tsv": "participant_id\tage\tsex\nsub-0001\t22\tfemale\n"},
        patients={"sub-0001"},
        facts={"age_years": 22.0, "sex": "F"},
    ),
    "msseg-2016": Fixture(
        images=_in(
            "Training/Center_01/Patient_01/Preprocessed_Data/",
            {"FLAIR_preprocessed": "FLAIR", "T1_preprocessed": "T1w"},
        ),
        labels={"Training/Center_01/Patient_01/Masks/Consensus.nii.gz": (1,)},
        left_out=2,
        patients={"Center_01-Patient_01"},
        names={"multiple sclerosis lesion"},
        extra={
            **volume_writer("Training/Center_01/Patient_01/Raw_Data/FLAIR.nii.gz"),
            **volume_writer("Training/Center_01/Patient_01/Masks/ManualSegmentation_1.nii.gz"),
        },
    ),
    "isbi-2015-ms": Fixture(
        images=_in(
            "training01/preprocessed/training01_02_",
            {"flair_pp": "FLAIR", "mprage_pp": "T1w", "pd_pp": "PD", "t2_pp": "T2w"},
            ".nii",
        ),
        labels={"training01/masks/training01_02_mask1.nii": (1,)},
        left_out=2,
        patients={"01"},
        names={"multiple sclerosis lesion"},
        extra={
            **volume_writer("training01/orig/training01_02_flair.nii"),
            **volume_writer("training01/masks/training01_02_mask2.nii"),
        },
    ),
    "wmh-2017": Fixture(
        images=_in("training/Amsterdam/GE3T/100/pre/", {"FLAIR": "FLAIR", "T1": "T1w"}),
        labels={"training/Amsterdam/GE3T/100/wmh.nii.gz": (1, 2)},
        extra={
            **volume_writer("training/Amsterdam/GE3T/100/orig/FLAIR.nii.gz"),
            **volume_writer("training/Amsterdam/GE3T/100/pre/3DT1.nii.gz"),
        },
        left_out=2,
        patients={"GE3T-100"},
        names={"white matter hyperintensity", "other pathology"},
    ),
    "epvs-2024": Fixture(
        images=_in("ED/ED_01_01/ED_01_01_", {"T1w": "T1w", "T2w": "T2w", "FLAIR": "FLAIR"}),
        labels={"ED/ED_01_01/ED_01_01_PVS.nii.gz": (1,)},
        patients={"ED_01_01"},
        names={"perivascular space"},
    ),
    "bonbid-hie": Fixture(
        images={"0ADC/MGHNICU_010-VISIT_01-ADC.nii.gz": "ADC"},
        labels={"3LABEL/MGHNICU_010_lesion.nii.gz": (1,)},
        extra=volume_writer("2Z_ADC/Zmap_MGHNICU_010.nii.gz"),
        left_out=1,
        patients={"MGHNICU_010"},
        names={"hypoxic-ischaemic lesion"},
    ),
    "insted": Fixture(
        images={"IA_training/7.nii.gz": "MRA", "healthy_training/7.nii.gz": "MRA"},
        labels={"IA_training_seg/7seg.nii.gz": (1,)},
        unnamed_labels=True,
        patients={"IA-7", "healthy-7"},
        classes={"aneurysm", "normal"},
    ),
    "cas2023": _nnunet("CAS2023/", "001", "MRA", channel=False),
    "smile-uhura-2023": Fixture(
        images={"TrainingSet/train/sub001_TOF.nii.gz": "MRA"},
        labels={"TrainingSet/train_label/sub001_TOF.nii.gz": (1,)},
        extra=volume_writer("TrainingSet/train_OMELETTElabel/sub001_TOF.nii.gz"),
        left_out=1,
        patients={"sub001"},
        names={"vessel"},
    ),
    "mrbrains13": Fixture(
        images=_in("TrainingData/1/", {"T1": "T1w", "T1_IR": "T1w", "T2_FLAIR": "FLAIR"}, ".nii"),
        labels={"TrainingData/1/LabelsForTraining.nii": (1, 8)},
        unnamed_labels=True,
        extra=volume_writer("TrainingData/1/T1_1mm.nii") | volume_writer("TrainingData/1/LabelsForTesting.nii"),
        left_out=2,
        patients={"1"},
    ),
    "iseg-2019": _nnunet("iSeg/", "subject-1", "T1w", word="T1"),
    "brainptm-2021": Fixture(
        images=_in("sheba75_data_train/case_1/", {"T1": "T1w", "Diffusion": "DWI"}),
        extra=volume_writer("sheba75_data_train/case_1/brain_mask.nii.gz"),
        left_out=1,
        labels={
            "sheba75_tracts_train/case_1/OR_left.nii.gz": (0, 1),
            "sheba75_tracts_train/case_1/CST_right.nii.gz": (1, 0),
        },
        texts={"sheba75_data_train/case_1/Diffusion.bvals": "0", "sheba75_data_train/case_1/Diffusion.bvecs": "0"},
        patients={"case_1"},
        names={"left optic radiation", "right corticospinal tract"},
    ),
    "lisa-2024": _nnunet("LISA/", "LISA_0001", "T2w"),
    "ixi": Fixture(
        images=_in("IXI-T1/IXI002-Guys-0828-", {"T1": "T1w", "T2": "T2w", "PD": "PD", "MRA": "MRA"}),
        patients={"IXI002"},
        extra=volume_writer("IXI-DTI/IXI002-Guys-0828-DTI-00.nii.gz"),
        left_out=1,
    ),
    "l2r-oasis": _nnunet("L2R/", "OASIS_0001", "T1w", card="OASIS_dataset.json"),
    "fomo60k": Fixture(
        images=_in("sub_0001/ses_1/", {"t1": "T1w", "t2": "T2w", "flair": "FLAIR", "dwi": "DWI"}), patients={"sub_0001"}
    ),
    "mood-brain": Fixture(
        images={"brain/brain_train/00001.nii.gz": "T2w"},
        extra=volume_writer("brain/toy/toy_0.nii.gz"),
        left_out=1,
        patients={"00001"},
    ),
    "mr-rate": Fixture(
        images={"mri/batch00/s1.zip": "T1w"},
        patients={"s1"},
        report="headache\nT1\nno lesion\nnormal",
        classes={"atrophy"},
        left_out=1,
        writers={
            "mri/batch00/s1.zip": zip_writer(
                {
                    "s1/img/s1_t1w-raw-axial.nii.gz": image_of("rate"),
                    "s1/seg/s1_t1w_brain-mask.nii.gz": image_of("mask"),
                }
            )
        },
        texts={
            "reports.csv": "uid,clinical_information,technique,findings,impression\ns1,headache,T1,no lesion,normal\n",
            "labels.csv": "study_uid,atrophy,infarct\ns1,1,0\n",
        },
    ),
    "radgenome-brain-mri": Fixture(
        images={"images/case7/case7_t1ce.nii.gz": "T1w"},
        texts={"modal_wise_finding.json": json.dumps({"case7": "A rim of enhancement."})},
        patients={"case7"},
        report="A rim of enhancement.",
    ),
    "msseg08": Fixture(
        images=_in(
            "CHB_test1_Part1/CHB_test1_Case01/CHB_test1_Case01_", {"FLAIR": "FLAIR", "T1": "T1w", "T2": "T2w"}, ".nhdr"
        ),
        patients={"CHB_test1_Case01"},
    ),
    "vesselmnist3d": Fixture(
        images={"vesselmnist3d.npz": "MRA"},
        num_volumes=3,
        patients={"vesselmnist3d#train_images"},
        classes={"vessel", "aneurysm"},
        left_out=1,
        writers={
            "vesselmnist3d.npz": npz_writer(
                train_images=image_of("mnist", (3, *SHAPE)).astype(np.uint8),
                train_labels=np.array([[0], [1], [0]], np.uint8),
            )
        },
    ),
}

_BODY = {
    "msd-task02-heart": _msd("Task02_Heart", "la_003", {"0": "MRI"}, (None,)),
    "msd-task05-prostate": _msd("Task05_Prostate", "prostate_00", {"0": "T2", "1": "ADC"}, ("T2w", "ADC")),
    "lumbosacral-spine": Fixture(
        images={"rawdata/sub-1/anat/sub-1_CISS.nii.gz": "T2w"},
        patients={"sub-1"},
        texts={"derivatives/markers/sub-1/sub-1dura.json": "{}"},
    ),
    "promise12": Fixture(
        images={"training_data/Case00.mhd": "T2w"},
        labels={"training_data/Case00_segmentation.mhd": (1,)},
        patients={"Case00"},
        names={"prostate"},
    ),
    "promise09": Fixture(
        images={"T1_images/1/000029.00003.001.nrrd": "T1w", "T2_images/1/000029.00004.001.nrrd": "T2w"},
        labels={"T2_segmented_images/1/000029.00004.001.nrrd": (1,)},
        patients={"1"},
        names={"prostate"},
    ),
    "promise12-msbench": Fixture(
        images={"promise12_128.npz": "T2w"},
        num_volumes=3,
        patients={"promise12_128#train_images"},
        names={"prostate"},
        left_out=1,
        writers={
            "promise12_128.npz": npz_writer(
                train_images=image_of("bench", (3, 10, 12)).astype(np.uint8), train_label=np.ones((3, 10, 12), np.uint8)
            )
        },
    ),
    "pi-cai": Fixture(
        images=_in(
            "images/10000/10000_1000000_",
            {"t2w": "T2w", "adc": "ADC", "hbv": "DWI", "cor": "T2w", "sag": "T2w"},
            ".mha",
        ),
        labels={"picai_labels/csPCa_lesion_delineations/human_expert/resampled/10000_1000000.nii.gz": (3,)},
        texts={
            "clinical_information/marksheet.csv": "patient,study,age,case_csPCa\n10000,1000000,73,YES\n10000,9,75,NO\n"
        },
        extra=volume_writer("picai_labels/anatomical_delineations/whole_gland/AI/10000_1000000.nii.gz"),
        left_out=1,
        patients={"10000"},
        names={"clinically significant prostate cancer"},
        classes={"clinically significant prostate cancer"},
        facts={"age_years": 73.0},
    ),
    "prostate158": Fixture(
        images=_in("train/020/", {"t2": "T2w", "adc": "ADC", "dwi": "DWI"}),
        labels={"train/020/t2_anatomy_reader1.nii.gz": (1, 2), "train/020/adc_tumor_reader1.nii.gz": (3,)},
        unnamed_labels=True,
        patients={"020"},
        names={"prostate tumour"},
    ),
    "mama-mia": Fixture(
        images=_in("images/DUKE_001/duke_001_", {"0000": "T1w", "0001": "T1w"}),
        labels={"segmentations/expert/DUKE_001.nii.gz": (1,)},
        extra=volume_writer("segmentations/automatic/DUKE_001.nii.gz"),
        left_out=1,
        patients={"DUKE_001"},
        names={"breast tumour"},
    ),
    "ispy1-tumor-seg": Fixture(
        images=_in(
            "images_bias-corrected_nifti/ISPY1_1001/ISPY1_1001_DCE_", {"0000_N3": "T1w", "0001_N3": "T1w"}, ".nii"
        ),
        labels={"masks_stv_manual/ISPY1_1001.nii.gz": (1,)},
        extra=volume_writer("masks_ftv/ISPY1_1001.nii.gz"),
        left_out=1,
        patients={"ISPY1_1001"},
        names={"breast tumour"},
    ),
    "odelia": Fixture(
        images=_in("UKA/data_unilateral/UKA_1_left/", {"Pre": "T1w", "Post_1": "T1w", "Sub_1": "T1w", "T2": "T2w"}),
        patients={"UKA_1_left"},
        classes={"malignant lesion"},
        texts={
            "UKA/metadata/annotation.csv": "UID,PatientID,Age,Lesion\nUKA_1_left,UKA_1,600,2\n",
            "UKA/metadata/split.csv": "UID,Fold,Split\n",
        },
    ),
    "mrnet": Fixture(
        images={"train/sagittal/0007.npy": "T2w", "train/coronal/0007.npy": "T1w", "train/axial/0007.npy": "PD"},
        patients={"0007"},
        classes={"abnormal", "ACL tear"},
        texts={
            "train-abnormal.csv": "0007,1\n0008,0\n",
            "train-acl.csv": "0007,1\n0008,0\n",
            "train-meniscus.csv": "0007,0\n0008,0\n",
        },
    ),
    "oai-zib-cm": _nnunet("OAIZIB-CM/", "oaizib_001", None),
    "spider": Fixture(
        images=_in("images/1_", {"t1": "T1w", "t2": "T2w", "t2_SPACE": "T2w"}, ".mha"),
        labels={"masks/1_t1.mha": (1, 100, 201), "masks/1_t2.mha": (1, 100, 201)},
        texts={"overview.csv": "a\n1\n"},
        patients={"1"},
        names={"vertebra 1", "spinal canal", "intervertebral disc 1"},
    ),
    "ivdm3seg": Fixture(
        images=_in("01/01_", {"fat": None, "inn": None, "opp": None, "wat": None}, ".nii"),
        labels={"01/01_Labels.nii": (1,)},
        patients={"01"},
        names={"intervertebral disc"},
    ),
    "amos22-mr": Fixture(
        images={"AMOS22/imagesTr/amos_0507.nii.gz": None},
        labels={"AMOS22/labelsTr/amos_0507.nii.gz": (1, 2)},
        left_out=1,
        extra=volume_writer("AMOS22/imagesTr/amos_0004.nii.gz"),
        texts={
            "AMOS22/dataset.json": _card(
                {"0": "background", "1": "spleen", "2": "right kidney"}, {"0": "CT"}, key="modality"
            )
        },
        patients={"amos_0507"},
        names={"spleen", "right kidney"},
    ),
    "lld-mmri": Fixture(
        images=_in(
            "classification_dataset/images/MR-391135/",
            {"C-pre": "T1w", "C+A": "T1w", "DWI": "DWI", "T2WI": "T2w", "In": "T1w"},
        ),
        patients={"MR-391135"},
    ),
    "flare24-task3-mr": Fixture(
        images={
            "FLARE24-Task3-MR/PublicValidation/imagesVal/amos_7324_0000.nii.gz": None,
            "FLARE24-Task3-MR/Training/LLD-MMRI-3984/MR1_C+A.nii.gz": None,
        },
        labels={"FLARE24-Task3-MR/PublicValidation/labelsVal/amos_7324.nii.gz": (1, 13)},
        unnamed_labels=True,
        patients={"amos_7324", "MR1_C+A"},
    ),
    "atlas-hcc": _nnunet("ATLAS/", "im0", "T1w", channel=False),
    "cirrmri600": Fixture(
        images={"Cirrhosis_T1_3D/train_images/4.nii.gz": "T1w", "Cirrhosis_T2_3D/train_images/4.nii.gz": "T2w"},
        labels={"Cirrhosis_T1_3D/train_masks/4.nii.gz": (1,), "Cirrhosis_T2_3D/train_masks/4.nii.gz": (1,)},
        patients={"4"},
        names={"liver"},
    ),
    "totalsegmentator-mri": Fixture(
        images={"s0001/mri.nii.gz": None},
        labels={"s0001/segmentations/kidney_left.nii.gz": (0, 1), "s0001/segmentations/spleen.nii.gz": (1, 0)},
        patients={"s0001"},
        names={"kidney left", "spleen"},
        texts={"meta.csv": "image_id;age;gender;manufacturer;scanner_model\ns0001;61;m;siemens;Aera\n"},
        facts={"sex": "M", "age_years": 61.0, "vendor": "Siemens", "model_name": "Aera"},
    ),
    "sppin": Fixture(
        images=_in(
            "SPPIN_train/PT_01/20200101/PT_01_",
            {"T1_gd_20200101": "T1w", "T2_20200101": "T2w", "DWI_b0_20200101": "DWI"},
        ),
        labels={"SPPIN_train/PT_01/20200101/PT_01_NB_20200101.nii.gz": (1,)},
        patients={"PT_01"},
        names={"neuroblastoma"},
    ),
    "acdc": Fixture(
        images={
            "training/patient001/patient001_frame01.nii.gz": None,
            "training/patient001/patient001_frame12.nii.gz": None,
        },
        left_out=1,
        extra={"training/patient001/patient001_4d.nii.gz": four_d_writer("acdc", 3)},
        labels={
            "training/patient001/patient001_frame01_gt.nii.gz": (1, 2, 3),
            "training/patient001/patient001_frame12_gt.nii.gz": (1, 2, 3),
        },
        unnamed_labels=True,
        texts={"training/patient001/Info.cfg": "ED: 1\nES: 12\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"},
        patients={"patient001"},
        classes={"DCM"},
    ),
    "mms": Fixture(
        images={"Training/Labeled/A0S9V9/A0S9V9_sa.nii.gz": None},
        num_volumes=3,
        unnamed_labels=True,
        patients={"A0S9V9"},
        classes={"DCM"},
        facts={"sex": "F", "age_years": 51.0},
        writers={"Training/Labeled/A0S9V9/A0S9V9_sa.nii.gz": four_d_writer("mms", 3)},
        extra={
            "Training/Labeled/A0S9V9/A0S9V9_sa_gt.nii.gz": lambda p: save_nifti(
                p, np.stack([label_array((1, 2, 3))] * 3), oblique_affine()
            )
        },
        texts={"211230_M&Ms_Dataset_information_diagnosis_opendataset.csv": _mms_table()},
    ),
    "mms2": Fixture(
        images={"001/001_SA_ED.nii.gz": None, "001/001_LA_ES.nii.gz": None},
        labels={"001/001_SA_ED_gt.nii.gz": (1, 2, 3), "001/001_LA_ES_gt.nii.gz": (1, 2, 3)},
        unnamed_labels=True,
        extra={"001/001_SA_CINE.nii.gz": four_d_writer("cine", 2)},
        left_out=1,
        patients={"001"},
        classes={"NOR"},
        texts={
            "dataset_information.csv": "CODE,DISEASE,VENDOR,SCANNER,FIELD\n1,NOR,Philips Medical Systems,Achieva,1.5\n"
        },
        facts={"vendor": "Philips", "model_name": "Achieva", "field_strength_t": 1.5},
    ),
    "mm-whs": Fixture(
        images={"mr_train/mr_train_1001_image.nii.gz": None},
        labels={"mr_train/mr_train_1001_label.nii.gz": (205, 820)},
        patients={"mr_train_1001"},
        names={"heart substructures"},
    ),
    "lascarqs-2022": Fixture(
        images={"task1/train_data/train_1/enhanced.nii.gz": None},
        labels={
            "task1/train_data/train_1/atriumSegImgMO.nii.gz": (0, 1),
            "task1/train_data/train_1/scarSegImgM.nii.gz": (1, 0),
        },
        patients={"train_1"},
        names={"left atrium", "scar"},
    ),
    "emidec": Fixture(
        images={
            "emidec-dataset-1.0.1/Case_P001/Images/Case_P001.nii.gz": None,
            "emidec-dataset-1.0.1/Case_N006/Images/Case_N006.nii.gz": None,
        },
        unnamed_labels=True,
        labels={
            "emidec-dataset-1.0.1/Case_P001/Contours/Case_P001.nii.gz": (1, 2, 3),
            "emidec-dataset-1.0.1/Case_N006/Contours/Case_N006.nii.gz": (1, 2),
        },
        texts={"emidec-dataset-1.0.1/Case_P001.txt": "Sex: M"},
        patients={"Case_P001", "Case_N006"},
        classes={"myocardial infarction", "normal"},
    ),
    "hvsmr": Fixture(
        images={"training_axial_full_pat0.nii.gz": None},
        labels={"training_axial_full_pat0_label_A.nii.gz": (1, 2)},
        extra=volume_writer("training_axial_full_pat0_label_B.nii.gz"),
        left_out=1,
        unnamed_labels=True,
        patients={"pat0"},
    ),
    "cmrxmotion": Fixture(
        images={"data/P001-1/P001-1-ED.nii.gz": None, "data/P001-1/P001-1-ES.nii.gz": None},
        labels={"data/P001-1/P001-1-ED-label.nii.gz": (1, 2, 3), "data/P001-1/P001-1-ES-label.nii.gz": (1, 2, 3)},
        texts={"IQA.csv": "a\n"},
        unnamed_labels=True,
        patients={"P001"},
    ),
    "hnts-mrg-2024": Fixture(
        images={"train/2/preRT/2_preRT_T2.nii.gz": "T2w", "train/2/midRT/2_midRT_T2.nii.gz": "T2w"},
        labels={"train/2/preRT/2_preRT_mask.nii.gz": (1, 2), "train/2/midRT/2_midRT_mask.nii.gz": (1, 2)},
        unnamed_labels=True,
        extra=volume_writer("train/2/midRT/2_preRT_T2_registered.nii.gz"),
        left_out=1,
        patients={"2"},
    ),
    "han-seg": Fixture(
        images={"case_01/case_01_IMG_MR_T1.nrrd": "T1w"},
        labels={"case_01/case_01_OAR_Parotid_L.seg.nrrd": (0, 1), "case_01/case_01_OAR_SpinalCord.seg.nrrd": (1, 0)},
        extra=volume_writer("case_01/case_01_IMG_CT.nrrd"),
        left_out=1,
        texts={"patient_data.csv": "case,sex,age\ncase_01,F,64\n", "OAR_data.csv": "a\n"},
        patients={"case_01"},
        names={"Parotid L", "SpinalCord"},
        facts={"sex": "F", "age_years": 64.0},
    ),
}

FIXTURES: dict[str, Fixture] = {**_KSPACE, **_BRATS, **_DICOM, **_BRAIN, **_BODY}
"""Name of every catalogued set to its fixture."""

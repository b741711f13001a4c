#!/bin/sh
# Everything behind docs/results/atop.md. The same command goes on after a stop and runs no finished row again.
# REDAN_DATA names the folder of data sets; benchmarks/atop_tables.py FOLDER prints the tables.
#
#   sh benchmarks/atop_table.sh [FOLDER] [STEPS]
out=${1:-runs/atop}
attack=purification-${2:-50}
plain=$out/plain/standard-cifar10-mini-seed0
arat=$out/plain/arat-cifar10-mini-seed0
transform=purification.transform
status=0

# table NAME RECIPE... [OPTION...]: each under the protocol, on the first 512 test images
table() {
    name=$1
    shift
    redan sweep "$@" --attack "$attack" --samples 512 --out "$out/$name" || status=$?
    test $status -le 1 || exit $status # 1: a row failed, which the others can do without
}

# base NAME RECIPE [OPTION...]: the classifier of the plain run, and a purifier that has learnt to complete images
base() {
    run=$out/base/$1
    shift
    resume=
    test -e "$run/recipe.yaml" && resume=--resume
    redan train "$@" -o purification.trained_classifier="$plain" -o purification.classifier_training.epochs=0 \
        -o epochs=1 --out "$run" $resume || exit
}

# from NAME [CLASSIFIER]: options that go on from a base, so that the rows of a transform differ in finetuning alone
from() {
    echo "-o purification.trained_purifier=$out/base/$1 -o purification.pretraining.epochs=0" \
        "-o purification.trained_classifier=${2:-$plain} -o purification.classifier_training.epochs=0"
}

table plain standard-cifar10-mini pgd-at-cifar10-mini arat-cifar10-mini
for rt in rt1 rt2 rt3; do
    base $rt atop-off-$rt-cifar10-mini
done
# Told of nothing, of classes, attacked as the paper has it; and with all that the public code does otherwise.
table rt2 atop-off-rt2-cifar10-mini atop-clean-cifar10-mini atop-cifar10-mini atop-code-cifar10-mini $(from rt2)
table adversary atop-cifar10-mini $(from rt2) --grid purification.adversary=classifier # the code's, and nothing else of it
table rt1 atop-off-rt1-cifar10-mini atop-rt1-cifar10-mini $(from rt1) # masks alone
table rt3 atop-off-rt3-cifar10-mini atop-rt3-cifar10-mini $(from rt3)
table fixed atop-cifar10-mini $(from rt2) --grid $transform.masks=fixed
# Noise alone; and as much noise at 32 pixels as the paper's 0.25 leaves of an image of 256 that is made smaller.
base noise atop-off-rt2-cifar10-mini -o $transform.missing=0.0
table noise atop-cifar10-mini $(from noise) --grid $transform.missing=0.0
base little atop-off-rt2-cifar10-mini -o $transform.sigma=0.03125
table little atop-off-rt2-cifar10-mini atop-cifar10-mini $(from little) --grid $transform.sigma=0.03125
table arat atop-arat-cifar10-mini $(from rt2 "$arat")
# Threats that training did not see.
for run in "$out/plain/pgd-at-cifar10-mini-seed0" "$out/rt2/atop-cifar10-mini-seed0"; do
    redan evaluate "$run" --attack "$attack" --samples 512 --threat l2:0.5 --threat l2:1.0 --threat stadv:0.05 --resume ||
        exit
done
exit $status

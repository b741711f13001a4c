#!/bin/sh
# Everything behind docs/results/atop.md. The same command goes on after a stop and repeats nothing that is finished.
# REDAN_DATA names the folder of data sets; benchmarks/atop_tables.py FOLDER prints the tables.
#
#   sh benchmarks/atop_table.sh [FOLDER] [STEPS] [DRAWS] [TABLE...]
#
# Without tables it makes all. Several processes may share the work, each with tables of its own, once `classifiers` and
# `rt2` are made. Variables hold options, for a machine that is short of time: CLASSIFIER and PURIFIED of each such
# training, PRETRAINING of the first purifier's.
out=${1:-runs/atop}
steps=${2:-50}
draws=${3:-20}
all="classifiers rt2 rt1 rt3 noise masks published arat longer threats"
if test $# -gt 3; then shift 3; else set -- $all; fi
. "$(dirname "$0")/once.sh"
plain=$out/classifiers/standard-cifar10-mini
transform=purification.transform
little="-o $transform.sigma=0.03125" # of noise: what the paper's 0.25 at 256 pixels a side is once these are made 32

# evaluated NAME [THREAT...]: under the protocol, on the first 512 test images
evaluated() {
    name=$1
    shift
    for threat in "${@:-linf:8/255}"; do
        once "$(echo "evaluated $name $threat" | tr -c 'a-z0-9\n' -)" redan evaluate "$out/$name" \
            --attack "purification-$steps" --draws "$draws" --samples 512 --threat "$threat" \
            $(resumed "$out/$name"/results/purification-*.partial)
    done
}

# trained NAME RECIPE [OPTION...]
trained() {
    name=$1
    shift
    once "trained-$(echo "$name" | tr / -)" redan train "$@" --out "$out/$name" $(resumed "$out/$name/recipe.yaml")
}

# going_on NAME PURIFIER CLASSIFIER RECIPE [OPTION...]: a purifier trained further, before a classifier that is given
going_on() {
    name=$1 purifier=$2 classifier=$3 recipe=$4
    shift 4
    trained "$name" "$recipe" $PURIFIED "$@" \
        -o purification.trained_purifier="$out/$purifier" -o purification.pretraining.epochs=0 \
        -o purification.trained_classifier="$classifier" -o purification.classifier_training.epochs=0
    evaluated "$name"
}

# row NAME RECIPE [OPTION...]: from the table's untold purifier on, so that its rows differ in finetuning alone
row() {
    name=$1
    shift
    going_on "$name" "${name%/*}/untold" "$plain" "$@"
}

# pair UNTOLD ATOP [OPTION...]: RT2's purifier learns what another transform leaves of an image, and then of attacks
pair() {
    off=$1 told=$2
    shift 2
    going_on "$table/untold" rt2/untold "$plain" "$off" "$@"
    row "$table/atop" "$told" "$@"
}

for table in "$@"; do
    case $table in
    classifiers)
        for recipe in standard-cifar10-mini pgd-at-cifar10-mini arat-cifar10-mini; do
            trained "classifiers/$recipe" "$recipe" $CLASSIFIER
            evaluated "classifiers/$recipe"
        done
        ;;
    rt2) # told of nothing, of classes, of attacks on the whole and on the bare classifier; and as the code has it in all
        trained rt2/untold atop-off-rt2-cifar10-mini $little $PURIFIED $PRETRAINING \
            -o purification.trained_classifier="$plain" -o purification.classifier_training.epochs=0
        evaluated rt2/untold
        row rt2/atop atop-cifar10-mini $little
        row rt2/clean atop-clean-cifar10-mini $little
        row rt2/adversary atop-cifar10-mini $little -o purification.adversary=classifier
        row rt2/code atop-code-cifar10-mini $little
        ;;
    rt1) # masks alone
        pair atop-off-rt1-cifar10-mini atop-rt1-cifar10-mini
        ;;
    rt3) # each pixel hidden once, by four passes; each is one of RT2, which the purifier knows
        going_on rt3/untold rt2/untold "$plain" atop-off-rt3-cifar10-mini $little -o epochs=1
        row rt3/atop atop-rt3-cifar10-mini $little
        ;;
    noise) # alone
        pair atop-off-rt2-cifar10-mini atop-cifar10-mini $little -o $transform.missing=0.0
        ;;
    masks) # the same for all images, for ever
        pair atop-off-rt2-cifar10-mini atop-cifar10-mini $little -o $transform.masks=fixed
        ;;
    published) # noise of 0.25, at 32 pixels
        pair atop-off-rt2-cifar10-mini atop-cifar10-mini
        ;;
    arat)
        going_on arat/atop rt2/untold "$out/classifiers/arat-cifar10-mini" atop-arat-cifar10-mini $little
        ;;
    longer) # attacks, on fewer images: on AToP, and where gradients are noisiest
        for name in rt2/atop published/untold published/atop; do
            once "longer-$(echo $name | tr / -)" redan evaluate "$out/$name" --attack "pgd-$((4 * steps)):cw" \
                --draws $((4 * draws)) --samples 128 --threat linf:8/255 --no-curve \
                $(resumed "$out/$name"/results/pgd-*.partial)
        done
        ;;
    threats) # that training did not see
        for name in classifiers/pgd-at-cifar10-mini rt2/atop; do
            evaluated $name l2:0.5 l2:1.0 stadv:0.05
        done
        ;;
    *)
        echo "atop_table.sh: no table is called $table" >&2
        exit 2
        ;;
    esac
done

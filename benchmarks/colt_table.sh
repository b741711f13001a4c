#!/bin/sh
# Everything behind docs/results/colt.md. The same command goes on after a stop and repeats nothing that is finished.
# REDAN_DATA names the folder of data sets; benchmarks/colt_tables.py FOLDER prints the tables.
#
#   sh benchmarks/colt_table.sh [FOLDER] [SECONDS]       SECONDS: for each image that bounds leave open
out=${1:-runs/colt}
seconds=${2:-10}
. "$(dirname "$0")/once.sh"

# row STEPS RECIPE...: each trained, and attacked or certified, step by step, on the first 1,000 test images
row() {
    steps=$1
    shift
    for recipe in "$@"; do
        run=$out/$recipe
        once "$recipe" redan train "$recipe" --out "$run" $(resumed "$run/recipe.yaml")
        for step in $steps; do
            case $step in
            autoattack)
                once "$recipe-$step" redan evaluate "$run" --attack autoattack --samples 1000 --no-curve \
                    $(resumed "$run"/results/autoattack-*.partial)
                ;;
            *)
                once "$recipe-$step-$seconds" redan certify "$run" --method "$step" --samples 1000 --timeout "$seconds" \
                    --no-curve $(resumed "$run"/certificates/"$step"-*.partial)
                ;;
            esac
        done
    done
}

row 'autoattack zonotope colt cascade' colt-mnist-mini pgd-at-mnist-mini
row 'autoattack zonotope colt cascade' colt-cifar10-mini pgd-at-cifar10-mini-convmed
# What the cascade leaves open of these is little: it brackets their accuracy without AutoAttack.
row 'interval zonotope cascade' ibp-mnist-mini crown-ibp-mnist-mini sabr-mnist-mini mtl-ibp-mnist-mini
row 'interval cascade' ibp-mnist-mini-cnn7 crown-ibp-mnist-mini-cnn7 sabr-mnist-mini-cnn7 mtl-ibp-mnist-mini-cnn7

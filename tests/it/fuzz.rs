//! Goal: no text makes the planner's JSON form panic, run without end or allocate by a number that
//! it was given; whatever is not a plan is a refusal that says why.
//! Method: inputs that are right, then changed at random, as text and as values. `DGLS_SEEDS`
//! multiplies the rounds.

use std::panic::catch_unwind;

use dgls_core::Error;
use dgls_core::plan::plan_json;
use serde_json::{Value, json};

use crate::random::Random;
use crate::watchdog::for_seeds;

const ROUNDS: u64 = 40_000;

/// Inputs of a few blocks, small enough to be planned in a millisecond.
fn right(random: &mut Random) -> Value {
    let block = |random: &mut Random| {
        let tensors: Vec<u64> =
            (0..random.between(1, 4)).map(|_| random.between(0, 5000)).collect();
        let mut block = json!({ "bytes": tensors.iter().sum::<u64>(), "compute_s": 0.001 });
        if random.chance(70) {
            block["tensor_bytes"] = json!(tensors);
        }
        if random.chance(30) {
            block["count"] = json!(random.between(1, 3));
        }
        block
    };
    let blocks: Vec<Value> = (0..random.between(1, 5)).map(|_| block(random)).collect();
    let mut inputs = json!({
        "blocks": blocks,
        "budget_bytes": random.between(0, 30_000),
        "h2d_bytes_per_s": 1e6,
        "copy_latency_s": random.pick(&[0.0, 1e-5]),
    });
    let optional = [
        ("outside_s", json!(0.01)),
        ("granularity", random.pick(&["tensor", "block"]).into()),
        ("granularity", json!(random.between(1, 3000))),
        ("static_addresses", json!(false)),
        ("resident", json!([0])),
        ("prefetch", json!(random.between(0, 3))),
        ("verify", json!(true)),
    ];
    for (key, value) in optional {
        if random.chance(25) {
            inputs[key] = value;
        }
    }
    inputs
}

/// Something that does not belong there.
fn wrong(random: &mut Random) -> Value {
    random
        .pick(&[
            "null",
            "true",
            "-1",
            "0",
            "1e400",
            "-0.0",
            "1e308",
            "5e-324",
            "18446744073709551615",
            "4611686018427387904",
            "1.5",
            "\"\"",
            "\"NaN\"",
            "[]",
            "{}",
            "[[]]",
            "[1e9]",
        ])
        .parse()
        .unwrap_or(Value::Null)
}

/// Puts something wrong at a random place of a value.
fn spoil(value: &mut Value, random: &mut Random) {
    match value {
        Value::Object(map) if !map.is_empty() && random.chance(90) => {
            let key = map.keys().nth(random.index(map.len())).cloned().unwrap_or_default();
            match random.between(0, 9) {
                0 => drop(map.remove(&key)),
                1 => drop(map.insert(format!("{key}_"), wrong(random))),
                _ => spoil(map.get_mut(&key).expect("it has this key"), random),
            }
        }
        Value::Array(list) if !list.is_empty() && random.chance(90) => {
            let at = random.index(list.len());
            match random.between(0, 9) {
                0 => drop(list.remove(at)),
                1 => list.insert(at, wrong(random)),
                _ => spoil(&mut list[at], random),
            }
        }
        value => *value = wrong(random),
    }
}

/// Changes bytes of a text.
fn scratch(text: &str, random: &mut Random) -> String {
    let mut bytes = text.as_bytes().to_vec();
    for _ in 0..random.between(1, 4) {
        let at = random.index(bytes.len().max(1));
        match random.between(0, 4) {
            0 => bytes.truncate(at),
            1 if at < bytes.len() => drop(bytes.remove(at)),
            2 => bytes.splice(at..at, *b"NaN").for_each(drop),
            3 => bytes.splice(at..at, "-Infinity\\\u{e9}".bytes()).for_each(drop),
            _ => bytes.insert(at, u8::try_from(random.between(32, 126)).expect("a letter")),
        }
        if bytes.is_empty() {
            break;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What the planner says of a text; it must say something.
fn ask(seed: u64, text: &str) -> Result<Value, String> {
    let said = catch_unwind(|| plan_json(text));
    match said.unwrap_or_else(|_| panic!("seed {seed}: a panic over {text}")) {
        Ok(plan) => Ok(serde_json::from_str(&plan).expect("a plan is JSON")),
        Err(Error::Invalid(reason)) => {
            assert!(!reason.is_empty(), "seed {seed}: no reason for {text}");
            Err(reason)
        }
        Err(error) => panic!("seed {seed}: {error} over {text}"),
    }
}

#[test]
fn whatever_the_text_the_planner_answers() {
    let said = for_seeds(ROUNDS * crate::watchdog::factor(), |seed| {
        let mut random = Random::new(seed);
        let mut inputs = right(&mut random);
        let plain = ask(seed, &inputs.to_string());
        let right = plain.unwrap_or_else(|error| panic!("seed {seed}: {error} over {inputs}"));
        assert!(right.get("infeasible").is_some() || right["period_s"].is_number(), "{right}");
        for _ in 0..random.between(1, 3) {
            spoil(&mut inputs, &mut random);
        }
        let spoiled = ask(seed, &inputs.to_string()).is_err();
        let scratched = ask(seed, &scratch(&inputs.to_string(), &mut random)).is_err();
        u64::from(spoiled) + u64::from(scratched)
    });
    let refused: u64 = said.iter().sum();
    let asked = 2 * said.len() as u64;
    assert!(refused * 10 > asked * 6, "{refused} of {asked} spoilt texts were refused");
    assert!(refused < asked, "some changes leave the inputs right");
}

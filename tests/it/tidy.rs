//! Goal: the tree keeps its own rules of size, opening sentences and unsafe code.
//! Method: reads every source file of the repository.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const MOST_LINES: usize = 400;
const MOST_COLUMNS: usize = 100;
const MOST_FILES: usize = 12;
const FOLDERS: [&str; 5] = ["src", "csrc", "torch_ext", "tests", "bench"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below a folder, without what tools leave there.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.expect("readable").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let foreign = name.starts_with('.')
            || ["__pycache__", "target", "build"].contains(&name)
            || path.extension().is_some_and(|extension| extension == "egg-info");
        if foreign {
            continue;
        }
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

struct File {
    /// Relative to the root, with slashes.
    name: String,
    text: String,
}

/// The project's own sources.
fn sources() -> Vec<File> {
    let mut paths = Vec::new();
    for folder in FOLDERS {
        files(&root().join(folder), &mut paths);
    }
    let is_source = |path: &PathBuf| {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        ["rs", "cpp", "h", "c", "py"].contains(&extension)
    };
    let read = |path: PathBuf| {
        let below = path.strip_prefix(root()).expect("below the root");
        let name = below.to_string_lossy().replace('\\', "/");
        File { name, text: std::fs::read_to_string(&path).expect("UTF-8") }
    };
    let sources: Vec<File> = paths.into_iter().filter(is_source).map(read).collect();
    assert!(sources.len() > 30, "{} files", sources.len());
    sources
}

fn assert_none(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn files_are_short_and_narrow() {
    let mut problems = Vec::new();
    for File { name, text } in sources() {
        let lines = text.lines().count();
        if lines > MOST_LINES {
            problems.push(format!("{name} has {lines} lines, more than {MOST_LINES}"));
        }
        for (number, line) in (1..).zip(text.lines()) {
            let columns = line.chars().count();
            if columns > MOST_COLUMNS {
                problems.push(format!("{name}:{number} has {columns} columns"));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn folders_are_small() {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for File { name, .. } in sources() {
        if name.starts_with("src/") {
            let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
            *counts.entry(folder.to_owned()).or_default() += 1;
        }
    }
    assert!(counts.len() >= 5, "{counts:?}");
    let large = counts.iter().filter(|&(_, &files)| files > MOST_FILES);
    let problems: Vec<String> =
        large.map(|(folder, files)| format!("{folder} has {files} files")).collect();
    assert_none(&problems);
}

/// The first sentence of a file, if it opens with one.
fn opening<'a>(name: &str, text: &'a str) -> Option<&'a str> {
    let first = text.lines().find(|line| !line.starts_with("#!"))?.trim();
    let marks: &[&str] = match name.rsplit_once('.')?.1 {
        "rs" => &["//! "],
        "py" => &["r\"\"\"", "\"\"\""],
        _ => &["/* ", "// ", "/// "],
    };
    let opened = marks.iter().find_map(|mark| first.strip_prefix(mark))?;
    opened.starts_with(|c: char| c.is_alphanumeric() || c == '`').then_some(opened)
}

#[test]
fn every_file_opens_with_a_sentence() {
    let mut problems = Vec::new();
    for File { name, text } in sources() {
        if !text.is_empty() && opening(&name, &text).is_none_or(|sentence| sentence.len() < 6) {
            let first = text.lines().next().unwrap_or_default();
            problems.push(format!("{name} opens with: {first}"));
        }
    }
    assert_none(&problems);
}

/// Whether the line has `unsafe` as a word of code: not in a comment, not the lint's name.
fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    code.match_indices("unsafe").any(|(at, word)| {
        let is_name = |c: char| c.is_alphanumeric() || c == '_';
        !code[..at].ends_with(is_name) && !code[at + word.len()..].starts_with(is_name)
    })
}

#[test]
fn unsafe_code_has_three_homes() {
    let at_home = |name: &str| {
        name.starts_with("src/driver/cuda/")
            || name.starts_with("src/driver/host/shim")
            || name == "src/bridge.rs"
    };
    let mut problems = Vec::new();
    let mut homes = 0;
    for File { name, text } in sources().into_iter().filter(|f| f.name.starts_with("src/")) {
        let found = (1..).zip(text.lines()).find(|(_, line)| is_unsafe(line));
        homes += usize::from(found.is_some());
        if let (Some((number, _)), false) = (found, at_home(&name)) {
            problems.push(format!("{name}:{number} has unsafe code"));
        }
    }
    assert_none(&problems);
    assert!(homes >= 3, "{homes} files with unsafe code");
}

#[test]
fn the_rules_are_not_empty() {
    assert!(is_unsafe("    unsafe { call() }"));
    assert!(is_unsafe("unsafe impl Send for X {}"));
    assert!(!is_unsafe("#![expect(unsafe_code, reason = \"\")]"));
    assert!(!is_unsafe("// unsafe is explained here"));
    assert!(opening("a.rs", "//! Decides something.").is_some());
    assert!(opening("a.rs", "use std::io;").is_none());
    assert!(opening("a.py", "\"\"\"Decides something.\"\"\"").is_some());
    assert!(opening("a.py", "import os").is_none());
    assert!(opening("a.cpp", "// Decides something.").is_some());
    assert!(opening("a.h", "#pragma once").is_none());
}

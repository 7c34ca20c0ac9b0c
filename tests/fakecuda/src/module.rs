//! Modules and their kernels: all but `fill` and `decode` fail when they run.

use parking_lot::Mutex;

use crate::codes::{Code, NOT_FOUND};
use crate::handles::Handles;

/// A loaded PTX image, of which only the entry names matter, and the handles of its functions.
pub(crate) struct Module {
    image: String,
    functions: Mutex<Vec<usize>>,
}

/// A kernel of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Function {
    /// `fill(u32 *target, u32 count, u32 value)`
    Fill,
    /// `decode(Batch batch)`, with a [`Batch`](crate::decode::Batch) by value
    Decode,
    Other,
}

impl Module {
    pub(crate) fn new(image: String) -> Self {
        Self { image, functions: Mutex::default() }
    }

    /// Makes a handle in `functions` for the entry `name`.
    pub(crate) fn function(
        &self,
        name: &str,
        functions: &Handles<Function>,
    ) -> Result<usize, Code> {
        if !self.image.contains(&format!(".entry {name}(")) {
            return Err(NOT_FOUND);
        }
        let function = match name {
            "fill" => Function::Fill,
            "decode" => Function::Decode,
            _ => Function::Other,
        };
        let handle = functions.insert(function.into());
        self.functions.lock().push(handle);
        Ok(handle)
    }

    /// Takes this module's functions out of `functions`.
    pub(crate) fn unload(&self, functions: &Handles<Function>) {
        for handle in self.functions.lock().drain(..) {
            // A module's function is removed only here, so it is still there.
            drop(functions.remove(handle));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_the_images_entries_and_go_with_the_module() {
        let functions = Handles::new();
        let image = [".visible .entry fill(.param) {}", ".entry decode(", ".entry scale("];
        let module = Module::new(image.concat());
        assert_eq!(module.function("fil", &functions), Err(NOT_FOUND));
        let kinds = ["fill", "decode", "scale"].map(|name| {
            let handle = module.function(name, &functions)?;
            functions.find(handle).map(|function| *function)
        });
        assert_eq!(kinds, [Ok(Function::Fill), Ok(Function::Decode), Ok(Function::Other)]);
        module.unload(&functions);
        assert_eq!(functions.count(), 0);
    }
}

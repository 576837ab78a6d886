//! One tensor in a file that `torch.load` reads: a zip archive, not compressed, of the numbers and of a pickle
//! that says what they are.

use std::io::{Seek, Write};

use candle_core::Tensor;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::terminal::Result;

/// Where torch begins the numbers of a tensor, so that they can be mapped into memory.
const ALIGNMENT: u16 = 64;

/// Writes a tensor of `f32`, as `torch.save(tensor, file)` does.
pub(crate) fn save(file: impl Write + Seek, tensor: &Tensor) -> Result<()> {
    let numbers = tensor.flatten_all()?.to_vec1::<f32>()?;
    let (mut zip, options) = (ZipWriter::new(file), SimpleFileOptions::default());
    let options = options.compression_method(CompressionMethod::Stored).with_alignment(ALIGNMENT);
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    for (name, content) in [
        ("data.pkl", pickle(tensor.dims())?),
        ("byteorder", b"little".to_vec()),
        ("data/0", bytes),
        ("version", b"3\n".to_vec()),
    ] {
        zip.start_file(format!("thoughts/{name}"), options)?;
        zip.write_all(&content)?;
    }
    zip.finish()?.flush()?;
    Ok(())
}

/// `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`, where the storage is
/// `('storage', torch.FloatStorage, '0', 'cpu', numel)`, named `0` in the archive; in the second protocol.
fn pickle(shape: &[usize]) -> Result<Vec<u8>> {
    let strides: Vec<usize> = (1..=shape.len())
        .map(|axis| shape.get(axis..).unwrap_or_default().iter().product())
        .collect();
    let mut pickle = Pickle(b"\x80\x02".to_vec());
    pickle.global("torch._utils", "_rebuild_tensor_v2");
    pickle.op(b'('); // the arguments
    pickle.op(b'('); // the storage
    pickle.text("storage")?;
    pickle.global("torch", "FloatStorage");
    pickle.text("0")?;
    pickle.text("cpu")?;
    pickle.number(shape.iter().product())?;
    pickle.op(b't');
    pickle.op(b'Q'); // by its name
    pickle.number(0)?;
    for numbers in [shape, &strides] {
        pickle.op(b'(');
        numbers.iter().try_for_each(|number| pickle.number(*number))?;
        pickle.op(b't');
    }
    pickle.0.push(0x89); // False: no gradient
    pickle.global("collections", "OrderedDict");
    pickle.op(b')');
    pickle.op(b'R');
    pickle.op(b't');
    pickle.op(b'R');
    pickle.op(b'.');
    Ok(pickle.0)
}

struct Pickle(Vec<u8>);

impl Pickle {
    fn op(&mut self, op: u8) {
        self.0.push(op);
    }

    fn global(&mut self, module: &str, name: &str) {
        self.0.extend_from_slice(format!("c{module}\n{name}\n").as_bytes());
    }

    fn text(&mut self, text: &str) -> Result<()> {
        self.op(b'X');
        self.0.extend_from_slice(&u32::try_from(text.len())?.to_le_bytes());
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }

    /// As an integer of 8 bytes, whatever its size.
    fn number(&mut self, number: usize) -> Result<()> {
        self.0.extend_from_slice(b"\x8a\x08");
        self.0.extend_from_slice(&i64::try_from(number)?.to_le_bytes());
        Ok(())
    }
}
